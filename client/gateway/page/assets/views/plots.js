// Plots of the last ten minutes: tokens per second, and the step time (p50 and p95).

import { html, useEffect, useRef } from "../dom.js";
import { PLOT_SECONDS } from "../data/store.js";
import { clock, isNumber, milliseconds, number } from "../data/text.js";
import { Panel } from "./parts.js";

const HEIGHT = 130;

/** The colour that a property of the sheet means in the theme of now; a canvas knows no light-dark(). */
function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}

function axis(extra = {}) {
  return { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, ...extra };
}

function windowTo(end) {
  return [end - PLOT_SECONDS, end];
}

function optionsOf(series, width) {
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    cursor: { show: false },
    scales: {
      x: { range: (_, low, high) => windowTo(high ?? Date.now() / 1000) },
      y: { range: (_, low, high) => [0, Math.max(1, (high ?? 1) * 1.15)] },
    },
    axes: [axis({ size: 28, values: (_, times) => times.map((at) => clock(at).slice(0, 5)) }), axis({ size: 44 })],
    series: [
      {},
      ...series.map(({ label, stroke, dash }) => ({ label, stroke: colour(stroke), width: 2, dash, spanGaps: false })),
    ],
  };
}

/** One plot.  rows: objects with `at` and the series' names; series: [{key, label, stroke, dash}]. */
function Plot({ rows, series, label, words }) {
  const holder = useRef(null);
  const plot = useRef(null);
  const data = [rows.map((row) => row.at), ...series.map(({ key }) => rows.map((row) => (isNumber(row[key]) ? row[key] : null)))];
  const latest = useRef(data);
  latest.current = data;
  useEffect(() => {
    const build = () => {
      plot.current?.destroy();
      const width = Math.max(120, holder.current.clientWidth);
      plot.current = new globalThis.uPlot(optionsOf(series, width), latest.current, holder.current);
    };
    build();
    const size = new ResizeObserver(() => {
      const width = Math.max(120, holder.current.clientWidth);
      if (width !== plot.current.width) plot.current.setSize({ width, height: HEIGHT });
    });
    size.observe(holder.current);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    addEventListener("raceme-theme", build);
    dark.addEventListener("change", build);
    return () => {
      size.disconnect();
      removeEventListener("raceme-theme", build);
      dark.removeEventListener("change", build);
      plot.current.destroy();
      plot.current = null;
    };
  }, []);
  useEffect(() => {
    plot.current?.setData(latest.current);
  }, [rows]);
  return html`<figure class="plot">
    <figcaption>${label} <strong>${words}</strong></figcaption>
    <div ref=${holder} role="img" aria-label="${label} over ten minutes: ${words}"></div>
  </figure>`;
}

const RATE = [{ key: "tokens_per_second", label: "tokens/s", stroke: "--accent" }];
const STEP = [
  { key: "step_ms_p50", label: "p50", stroke: "--accent" },
  { key: "step_ms_p95", label: "p95", stroke: "--warn", dash: [5, 4] },
];

export function Plots({ traffic }) {
  const last = traffic.at(-1) ?? {};
  const rate = isNumber(last.tokens_per_second) ? `now ${number(last.tokens_per_second, 1)}` : "no traffic yet";
  const step = isNumber(last.step_ms_p50)
    ? `p50 ${milliseconds(last.step_ms_p50)}, p95 (dashed) ${milliseconds(last.step_ms_p95)}`
    : "no step lately";
  return html`<${Panel} id="traffic" title="Traffic, ten minutes">
    <div class="plots">
      <${Plot} rows=${traffic} series=${RATE} label="tokens/s" words=${rate} />
      <${Plot} rows=${traffic} series=${STEP} label="step" words=${step} />
    </div>
  <//>`;
}
