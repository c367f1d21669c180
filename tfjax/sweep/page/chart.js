// SPDX-License-Identifier: Apache-2.0
// A line chart as SVG: axes, ticks, curves, and the point next to the pointer.

const SPACE = {left: 54, right: 16, top: 14, bottom: 44};
const NEAR = 40;  // pixels from a curve within which its values are shown

// What canvas.py's figures use too: dark to light without red and green.
const VIRIDIS = [
  [68, 1, 84], [71, 39, 119], [62, 73, 137], [48, 103, 141], [37, 130, 142],
  [30, 157, 136], [53, 183, 120], [109, 206, 88], [181, 221, 43]];

/** The colour of level `index` of `count`, of those seen on the theme. */
export function colour(index, count, isDark) {
  const [low, high] = isDark ? [0.32, 1] : [0, 0.9];
  const share = count > 1 ? index / (count - 1) : 0.5;
  const place = (low + (high - low) * share) * (VIRIDIS.length - 1);
  const left = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const mixed = VIRIDIS[left].map((value, k) => Math.round(
      value + (VIRIDIS[left + 1][k] - value) * (place - left)));
  return `rgb(${mixed.join(' ')})`;
}

/** Round numbers within [low, high], about `count` of them. */
export function ticks(low, high, count, isLog) {
  if (isLog && high / low > 8) return logTicks(low, high, count);
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high * (1 + 1e-9); k++) {
    found.push(Number((k * step).toPrecision(12)));
  }
  return found;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  const heads = decades * 3 <= count ? [1, 2, 5] :
      decades * 2 <= count ? [1, 3] : [1];
  const every = Math.max(1, Math.ceil(decades / count));
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    if (((power % every) + every) % every) continue;
    for (const head of heads) {
      const value = Number((head * 10 ** power).toPrecision(12));
      if (value >= low && value <= high) found.push(value);
    }
  }
  return found;
}

function make(name, attributes, text) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) {
    element.setAttribute(key, value);
  }
  if (text !== undefined) element.textContent = text;
  return element;
}

export class Chart {
  /**
   * svg: to draw in. tip: an element with a b and a span, for the point next
   * to the pointer.
   */
  constructor(svg, tip) {
    this.svg = svg;
    this.tip = tip;
    this.curves = [];
    svg.addEventListener('pointermove', (event) => this.point(event));
    svg.addEventListener('pointerleave', () => this.unpoint());
    new ResizeObserver(() => this.redraw()).observe(svg.parentElement);
  }

  /**
   * curves: {label, colour, xs, ys, isRunning, isDotted} each, the values
   * positive. axes: x and y, each {isLog, label, format}.
   */
  draw(curves, axes) {
    this.curves = curves.filter((curve) => curve.xs.length);
    this.axes = axes;
    this.redraw();
  }

  redraw() {
    const width = this.svg.parentElement.clientWidth;
    if (!this.axes || !width) return;
    const height = Math.round(Math.min(440, Math.max(260, width * 0.42)));
    this.svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    this.svg.setAttribute('height', height);
    this.svg.replaceChildren();
    this.mark = null;
    this.unpoint();
    if (!this.curves.length) return;
    this.x = this.scale('xs', this.axes.x, SPACE.left, width - SPACE.right);
    this.y = this.scale('ys', this.axes.y, height - SPACE.bottom, SPACE.top);
    this.drawAxes(width, height);
    for (const curve of this.curves) this.drawCurve(curve);
  }

  /** The place in pixels of a value, between `from` and `to`. */
  scale(name, axis, from, to) {
    let low = Infinity;
    let high = -Infinity;
    for (const curve of this.curves) {
      for (const value of curve[name]) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    const bend = axis.isLog ? Math.log : (value) => value;
    if (low === high) [low, high] = [low * 0.9, high * 1.1];
    const pad = (bend(high) - bend(low)) * (name === 'ys' ? 0.03 : 0);
    const [begin, end] = [bend(low) - pad, bend(high) + pad];
    const place = (value) =>
      from + (to - from) * (bend(value) - begin) / (end - begin);
    const straighten = axis.isLog ? Math.exp : (value) => value;
    place.ticks = ticks(straighten(begin), straighten(end),
        Math.max(3, Math.floor(Math.abs(to - from) / (name === 'ys' ? 48 : 90))),
        axis.isLog);
    return place;
  }

  drawAxes(width, height) {
    const bottom = height - SPACE.bottom;
    for (const value of this.y.ticks) {
      const y = this.y(value);
      this.svg.append(
          make('line', {class: 'grid', x1: SPACE.left, x2: width - SPACE.right,
            y1: y, y2: y}),
          make('text', {'x': SPACE.left - 8, 'y': y + 4, 'text-anchor': 'end'},
              this.axes.y.format(value)));
    }
    for (const value of this.x.ticks) {
      const x = this.x(value);
      this.svg.append(
          make('line', {class: 'axis', x1: x, x2: x, y1: bottom,
            y2: bottom + 4}),
          make('text', {'x': x, 'y': bottom + 18, 'text-anchor': 'middle'},
              this.axes.x.format(value)));
    }
    this.svg.append(
        make('line', {class: 'axis', x1: SPACE.left, x2: width - SPACE.right,
          y1: bottom, y2: bottom}),
        make('text', {'x': (SPACE.left + width - SPACE.right) / 2,
          'y': height - 8, 'text-anchor': 'middle'}, this.axes.x.label),
        make('text', {'x': 0, 'y': 0, 'text-anchor': 'middle',
          'transform': `translate(14 ${(SPACE.top + bottom) / 2}) rotate(-90)`},
        this.axes.y.label));
  }

  drawCurve(curve) {
    const points = curve.xs.map(
        (x, k) => `${this.x(x).toFixed(1)},${this.y(curve.ys[k]).toFixed(1)}`);
    const many = this.curves.length > 60;
    this.svg.append(make('path', {
      'd': `M${points.join('L')}`, 'stroke': curve.colour,
      'stroke-width': many ? 1 : 1.5, 'opacity': many ? 0.7 : 0.9}));
    const last = points.length - 1;
    points.forEach((point, k) => {
      if (!(curve.isDotted && points.length < 30) &&
          !(curve.isRunning && k === last)) return;
      const [cx, cy] = point.split(',');
      this.svg.append(make('circle', {cx, cy, r: 3, fill: curve.colour}));
    });
  }

  point(event) {
    if (!this.x) return;
    const box = this.svg.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let best = null;
    let least = NEAR ** 2;
    for (const curve of this.curves) {
      curve.xs.forEach((x, k) => {
        const dx = this.x(x) - px;
        const dy = this.y(curve.ys[k]) - py;
        if (dx * dx + dy * dy < least) {
          least = dx * dx + dy * dy;
          best = {curve, k};
        }
      });
    }
    if (best) this.show(best.curve, best.k, box);
    else this.unpoint();
  }

  show(curve, k, box) {
    const [cx, cy] = [this.x(curve.xs[k]), this.y(curve.ys[k])];
    if (!this.mark) {
      this.mark = make('circle', {'r': 4.5, 'stroke-width': 2});
      this.svg.append(this.mark);
    }
    for (const [name, value] of Object.entries(
        {cx, cy, fill: 'none', stroke: curve.colour})) {
      this.mark.setAttribute(name, value);
    }
    this.tip.querySelector('b').textContent = curve.label;
    this.tip.querySelector('span').textContent =
        `loss ${curve.ys[k].toFixed(4)} at ${this.axes.x.format(curve.xs[k])}` +
        ` ${this.axes.x.unit}`;
    this.tip.hidden = false;
    const width = this.tip.offsetWidth;
    const left = cx + 14 + width > box.width ? cx - 14 - width : cx + 14;
    this.tip.style.left = `${Math.max(4, left)}px`;
    this.tip.style.top = `${Math.max(4, cy - 46)}px`;
  }

  unpoint() {
    this.tip.hidden = true;
    if (this.mark) this.mark.remove();
    this.mark = null;
  }
}
