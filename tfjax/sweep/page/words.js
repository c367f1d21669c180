// SPDX-License-Identifier: Apache-2.0
// Numbers as text; what is not known is a dash.

const NONE = '–';
const RAISED = '⁰¹²³⁴⁵⁶⁷⁸⁹';
const isNumber = (value) => typeof value === 'number';

/** 1.23M */
export function amount(value) {
  if (!isNumber(value)) return NONE;
  for (const [power, prefix] of [[12, 'T'], [9, 'B'], [6, 'M'], [3, 'k']]) {
    if (Math.abs(value) >= 0.9995 * 10 ** power) {
      return `${Number((value / 10 ** power).toPrecision(3))}${prefix}`;
    }
  }
  return String(Number(value.toPrecision(3)));
}

/** 2.5·10¹⁵ */
export function power(value) {
  if (!isNumber(value)) return NONE;
  if (!value) return '0';
  let exponent = Math.floor(Math.log10(value));
  let head = Number((value / 10 ** exponent).toPrecision(3));
  if (head === 10) [head, exponent] = [1, exponent + 1];
  const raised = String(exponent).replace('-', '⁻').replace(
      /\d/g, (digit) => RAISED[digit]);
  return `${head === 1 ? '' : `${head}·`}10${raised}`;
}

export const plain = (value) =>
  isNumber(value) ? String(Number(value.toPrecision(4))) : NONE;

/** As short as a place on an axis must be. */
export const tick = (value) => value < 1e5 ? plain(value) : power(value);

export const loss = (value) => isNumber(value) ? value.toFixed(4) : NONE;

export const whole = (value) => isNumber(value) ?
    String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, ',') : NONE;

/** 99% until it is all. */
export const percent = (share) => isNumber(share) ?
    `${Math.floor(share * 100 + 1e-9)}%` : NONE;

/** Seconds as hours: 0.0123, 12.3, 12,300 */
export function hours(seconds) {
  if (!isNumber(seconds)) return 'unknown';
  const value = seconds / 3600;
  return value >= 1000 ? whole(value) : String(Number(value.toPrecision(3)));
}

/** Seconds in the two largest units that they have. */
export function duration(seconds) {
  const rounded = Math.round(seconds);
  if (rounded < 60) return `${rounded} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 48 * 60) {
    return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  }
  const inHours = Math.round(minutes / 60);
  return `${Math.floor(inHours / 24)} d ${inHours % 24} h`;
}

/** Of seconds since 1970; with the day where it is not today's, by far. */
export function timeOfDay(seconds, ahead) {
  const options = {hour: '2-digit', minute: '2-digit', hour12: false};
  if (!ahead) options.second = '2-digit';
  if (ahead > 12 * 3600) Object.assign(options, {weekday: 'short'});
  return new Intl.DateTimeFormat('en-GB', options).format(seconds * 1000);
}
