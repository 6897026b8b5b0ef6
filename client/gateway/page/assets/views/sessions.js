// The live sessions of this gateway, each with its route, and the log of what happened.

import { html } from "../dom.js";
import { clock, inert, isNumber, number, shortId } from "../data/text.js";
import { chainInWords } from "../data/trace.js";
import { Panel } from "./parts.js";

const MOST_ROWS = 100;

function Row({ session, nameOf, mine }) {
  const most = isNumber(session.max_tokens) ? `/${session.max_tokens}` : "";
  const recoveries = session.recoveries > 0 ? ` ⟲ ${session.recoveries}` : "";
  return html`<tr class="session ${inert(session.state)}">
    <th scope="row">${shortId(session.id)} ${mine ? html`<span class="muted">this chat</span>` : ""}</th>
    <td><bdi>${chainInWords(session.hops, nameOf) || "—"}</bdi></td>
    <td class="number">${isNumber(session.tokens_per_second) ? number(session.tokens_per_second, 1) : ""}</td>
    <td class="number">${number(session.tokens ?? 0)}${most}</td>
    <td>${inert(session.state)}${recoveries}</td>
  </tr>`;
}

export function Sessions({ sessions, nameOf, mine }) {
  const live = sessions.filter((session) => session.state !== "ended").length;
  return html`<${Panel} id="sessions" title="Sessions" aside=${html`<span class="muted">${live}</span>`}>
    ${sessions.length === 0
      ? html`<p class="muted">No request runs.</p>`
      : html`<div class="scroll" tabindex="0" role="group" aria-label="table of sessions">
          <table>
            <thead>
              <tr>
                <th scope="col">request</th>
                <th scope="col">route</th>
                <th scope="col" class="number">tok/s</th>
                <th scope="col" class="number">tokens</th>
                <th scope="col">state</th>
              </tr>
            </thead>
            <tbody>
              ${sessions
                .slice(0, MOST_ROWS)
                .map(
                  (session) =>
                    html`<${Row} key=${session.id} session=${session} nameOf=${nameOf} mine=${mine.has(session.id)} />`,
                )}
            </tbody>
          </table>
        </div>`}
    ${sessions.length > MOST_ROWS && html`<p class="muted">and ${sessions.length - MOST_ROWS} more</p>`}
  <//>`;
}

/** The log, the newest line first.  quiet: while the past is read nothing is said aloud. */
export function Log({ log, quiet }) {
  return html`<${Panel} id="events" title="Events">
    ${log.length === 0 && html`<p class="muted">Nothing has happened yet.</p>`}
    <div class="scroll log" role="log" aria-live=${quiet ? "off" : "polite"} aria-label="events" tabindex="0">
      <ol>
        ${[...log].reverse().map(
          (line) =>
            html`<li key=${line.key} class=${line.trouble ? "trouble" : ""}>
              <time>${clock(line.at)}</time> <bdi>${line.text}</bdi>
            </li>`,
        )}
      </ol>
    </div>
  <//>`;
}
