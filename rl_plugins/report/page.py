"""Template of the token-value page, which needs no network, loads no fonts, and opens in any browser."""

CARD = """<article class=$kind data-order="$order" data-reward="$reward" data-surprise="$surprise"
 data-verdict="$verdict">
<header><h2>#$number</h2><span class="badge $verdict">$badge</span><span class=fact>$count</span>$facts</header>
$chart
<div class=text>$prompt
<div class=tokens role=group aria-label="Completion $number; arrow keys move between tokens">$tokens</div></div>
</article>"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
$css</style></head>
<body data-mode="value" data-digits="$digits" data-size="$size">
<div class=head><h1>$title</h1>$subtitle$hint</div>
<div class=tools>
<div role=group aria-label="Colour by" data-group=mode><span>Colour</span>
<button aria-pressed=true data-pick=value>value</button
><button aria-pressed=false data-pick=delta>TD error</button>
</div>
<div role=group aria-label="Show" data-group=show><span>Show</span>
<button aria-pressed=true data-pick=all>all $n_all</button
><button aria-pressed=false data-pick=right>✓ right $n_right</button
><button aria-pressed=false data-pick=wrong>✗ wrong $n_wrong</button></div>
<div role=group aria-label="Sort by" data-group=sort><span>Sort</span>
<button aria-pressed=true data-pick=order>as given</button
><button aria-pressed=false data-pick=reward>reward</button
><button aria-pressed=false data-pick=surprise>largest |δ|</button></div>
<div><button id=numbers aria-pressed=false>numbers</button></div>
<div role=search class=find><label for=find>Find</label><input id=find type=search placeholder="in completions"
 autocomplete=off spellcheck=false><button id=previous aria-label="Previous match" disabled>↑</button
><button id=next aria-label="Next match" disabled>↓</button><output id=found for=find></output></div>
<div role=group aria-label="Theme" data-group=theme><span>Theme</span>
<button aria-pressed=true data-pick=system>system</button
><button aria-pressed=false data-pick=light>light</button
><button aria-pressed=false data-pick=dark>dark</button></div>
$legend
</div>
<main>
$cards
</main>
<p id=none hidden>No completion matches.</p>
<div id=tip role=status hidden></div>
<script>
$js</script>
</body></html>
"""

CSS = """:root{color-scheme:light dark;
--page:light-dark(#ffffff,#14171c);--ink:light-dark(#1c2128,#e4e8ee);--soft:light-dark(#59636e,#a3adb9);
--line:light-dark(#d5dae0,#363d47);--card:light-dark(#ffffff,#1b1f26);--well:light-dark(#f4f6f8,#242a33);
--accent:light-dark(#0b4a80,#8cc4f5);--on-accent:light-dark(#ffffff,#10151b);
--good:light-dark(#0b4a80,#8cc4f5);--bad:light-dark(#a3121f,#ff9c8c);--pay:light-dark(#7a4a00,#f2c14e);
--hit:light-dark(#d9480f,#ffb000)}
:root[data-theme=light]{color-scheme:light}:root[data-theme=dark]{color-scheme:dark}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:0 20px 60px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
h1{font-size:24px;line-height:1.25;margin:26px 0 4px}h2{font-size:15px;margin:0}
.head p{margin:0 0 6px;color:var(--soft)}
.head .hint{border-left:4px solid var(--pay);background:var(--well);color:var(--ink);padding:8px 12px;margin:10px 0;
border-radius:0 6px 6px 0}
.tools{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;gap:8px 18px;align-items:center;
padding:10px 0;margin-bottom:12px;background:var(--page);border-bottom:1px solid var(--line)}
[data-group],.find{display:flex;align-items:center}[data-group] span,.find label,output{color:var(--soft);
font-size:13px;margin-right:7px}
button,input{font:inherit;font-size:13px;padding:3px 11px;border:1px solid var(--line);background:var(--card);
color:var(--ink);border-radius:6px}
button{cursor:pointer}button:disabled{color:var(--soft);cursor:default}
input{width:160px;border-radius:6px 0 0 6px;padding:3px 8px}
[data-group] button,.find button{border-radius:0;margin-left:-1px}
[data-group] button:first-of-type{border-radius:6px 0 0 6px}
[data-group] button:last-of-type,.find button:last-of-type{border-radius:0 6px 6px 0}
output{margin:0 0 0 7px}
button:hover:enabled{background:var(--well)}
button[aria-pressed=true]{background:var(--accent);border-color:var(--accent);color:var(--on-accent);
font-weight:600}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px;z-index:1}
.scale{display:none;flex-wrap:wrap;align-items:flex-start;gap:4px 10px;font-size:13px;flex-basis:100%}
[data-mode=value] .scale.value,[data-mode=delta] .scale.delta{display:flex}
.scale b{font-weight:600;line-height:14px;white-space:nowrap}.scale>div{width:380px;max-width:70vw}
sub{line-height:0}
.bar{height:14px;border:1px solid var(--line);border-radius:3px}
.ticks{position:relative;height:18px;color:var(--soft);font-variant-numeric:tabular-nums}
.ticks span{position:absolute}.ticks span:nth-child(2){left:50%;transform:translateX(-50%)}
.ticks span:nth-child(3){right:0}
article{border:1px solid var(--line);border-radius:10px;background:var(--card);padding:10px 16px 12px;
margin:0 0 12px}
article.long{padding-bottom:16px}
[data-size=large] article{content-visibility:auto;contain-intrinsic-size:auto 90px}
[data-size=large] article.long{contain-intrinsic-size:auto 600px}
article.short{display:grid;grid-template-columns:minmax(0,1fr) 290px;gap:2px 24px}
.short .chart{grid-column:2;grid-row:1/3}.short .text{align-self:center}
header{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:center}
.badge{font-size:13px;font-weight:600;padding:1px 10px;border-radius:99px;border:1.5px solid;
white-space:nowrap}
.badge.right{color:var(--good)}.badge.wrong{color:var(--bad);border-style:dashed}
.fact{font-size:13px;color:var(--soft);overflow-wrap:anywhere}.fact b{font-weight:600}
.chart{position:relative;height:46px;margin:9px 8px 7px 34px;align-self:center}
.chart.wide{height:150px;margin:14px 8px 26px 34px}
.chart svg{display:block;width:100%;height:100%;overflow:visible}
.chart path{vector-effect:non-scaling-stroke}
.chart span{position:absolute;font-size:11px;line-height:1;color:var(--soft);font-variant-numeric:tabular-nums;
pointer-events:none}
.chart .y{right:100%;transform:translate(-7px,-50%)}.chart .x{top:100%;transform:translate(-50%,8px)}
.chart .aim{left:100%;width:11px;height:11px;transform:translate(-50%,-50%);border-radius:99px;
background:var(--card);border:1.6px solid var(--ink)}
.curve{fill:none;stroke:var(--accent);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.grid{stroke:var(--line);fill:none}.cursor{stroke:var(--ink);stroke-width:1}
.stairs{fill:none;stroke:var(--pay);stroke-width:1.4;stroke-dasharray:3 1.5}
details{margin:2px 0 10px}summary{cursor:pointer;font-size:13px;color:var(--soft)}
.prompt{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--well);border-radius:6px;padding:8px 12px;
margin-top:4px;font-size:14px}
.prompt.line{padding:3px 8px;margin-right:8px}.line+.tokens{display:inline}
.tokens{line-height:2;overflow-wrap:anywhere;
font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",
"DejaVu Sans Mono",monospace;font-size:14px}
.t{unicode-bidi:isolate;padding:3px 1px;margin-right:1px;border-radius:3px;cursor:default;position:relative;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
.t i{font-style:normal;opacity:.6}.special{font-size:12px;border:1px dotted currentColor}
.byte{font-style:normal}.byte::before{content:"▪";font-size:9px;vertical-align:2px}
.t:hover,.t:focus{outline:2px solid var(--ink);outline-offset:0;z-index:1}
.t.hit{box-shadow:0 3px 0 -1px var(--hit),0 -3px 0 -1px var(--hit)}
.t.now{outline:2.5px solid var(--hit);outline-offset:1px;z-index:1}
[data-mode=value] .vna,[data-mode=delta] .dna{color:var(--ink);border-bottom:2px dashed var(--soft)}
.env{color:var(--soft);font-style:italic;border-bottom:1px dotted var(--soft)}
.t.env{border-radius:0;margin:0;padding:3px 0}
.pay{font:600 12px/1.3 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;
color:var(--pay);border:1.5px solid;border-radius:99px;padding:0 5px;margin:0 5px 0 2px;white-space:nowrap;
font-variant-numeric:tabular-nums}
.pay.minus{border-style:dashed}.pay.zero{color:var(--soft);font-weight:400;border-width:1px}
.turns{display:flex;flex-wrap:wrap;gap:6px 12px}
.turn{max-width:100%;min-width:0;padding-left:8px;border-left:2px solid var(--line)}
.tall{flex-basis:100%}
.no{font:11px/1 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;color:var(--soft);
margin-right:7px}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;flex-basis:100%;font-size:13px;color:var(--soft)}
.key .no{border-left:2px solid var(--line);padding-left:6px;margin-right:2px}
svg.line{display:inline-block;width:24px;height:12px;vertical-align:-1px}
.numbers .tokens{line-height:1.3}.numbers .line+.tokens{display:block;margin-top:6px}
.numbers .w{display:inline-flex;flex-wrap:wrap;max-width:100%;align-items:flex-start}
.numbers .t{display:inline-block;text-align:center;margin:0 2px 5px 0;padding:1px 3px;vertical-align:top}
.numbers .t::after{content:attr(data-n);display:block;font-size:11px;font-variant-numeric:tabular-nums}
.numbers .t.env::after{content:none}
#tip{position:absolute;z-index:3;pointer-events:none;background:var(--ink);color:var(--page);padding:6px 10px;
border-radius:6px;font-size:13px;line-height:1.45;white-space:pre;font-variant-numeric:tabular-nums;
max-width:90vw;
overflow:hidden}
[hidden],.left-out,[data-tools=off] :is([data-group],.find,#numbers){display:none!important}
.bar{-webkit-print-color-adjust:exact;print-color-adjust:exact}
@media (max-width:700px){.tools{position:static}body{padding:0 12px 40px}article{padding:10px 12px 12px}
article.short{display:block}}
@media print{:root,:root[data-theme]{color-scheme:light}.tools{position:static}
[data-group],.find,#numbers,#tip{display:none!important}
body{max-width:none;padding:0;font-size:11pt}header{break-after:avoid}
[data-size] article{content-visibility:visible}}
"""

JS = r"""const root = document.documentElement, body = document.body, main = document.querySelector("main");
const byId = (id) => document.getElementById(id);
const tip = byId("tip"), find = byId("find");
const digits = Number(body.dataset.digits);
const cards = [...main.querySelectorAll("article")];
const groups = [...document.querySelectorAll("[data-group]")];
const state = { mode: "value", show: "all", sort: "order", theme: "system" };

function format(text, places, signed) {
  const number = Number(text);  // "nan" and "inf" are not numbers in JavaScript either
  if (!Number.isFinite(number)) return "–";
  const shown = Math.abs(number).toFixed(places);
  const sign = Number(shown) === 0 ? "" : number < 0 ? "−" : signed ? "+" : "";
  return sign + shown;
}

function showNumbers() {
  if (!body.classList.contains("numbers")) return;
  const delta = state.mode === "delta";
  for (const el of main.querySelectorAll(".t"))
    el.dataset.n = format(delta ? el.dataset.delta : el.dataset.value, digits, delta);
}

function apply() {
  body.dataset.mode = state.mode;
  if (state.theme === "system") delete root.dataset.theme; else root.dataset.theme = state.theme;
  const key = (card) => Number(card.dataset[state.sort]) || 0;
  const order = (a, b) => Number(a.dataset.order) - Number(b.dataset.order);
  cards.sort((a, b) => (state.sort === "order" ? 0 : key(b) - key(a)) || order(a, b));
  main.append(...cards);
  for (const card of cards) card.hidden = state.show !== "all" && card.dataset.verdict !== state.show;
  byId("none").hidden = cards.some((card) => !card.hidden);
  showNumbers();
  search();
}

function pick(group, value) {
  const buttons = [...group.querySelectorAll("button")];
  if (!buttons.some((button) => button.dataset.pick === value)) return;
  for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.pick === value);
  state[group.dataset.group] = value;
}

for (const group of groups)
  group.addEventListener("click", (event) => {
    const picked = event.target.closest("button");
    if (!picked) return;
    pick(group, picked.dataset.pick);
    if (group.dataset.group === "theme") remember(state.theme);
    apply();
  });

// A page from a file may have no storage; then the theme is chosen anew each time.
function remember(theme) { try { localStorage.setItem("rl-plugins-theme", theme); } catch {} }
function remembered() { try { return localStorage.getItem("rl-plugins-theme"); } catch { return null; } }

byId("numbers").addEventListener("click", (event) => {
  event.target.setAttribute("aria-pressed", body.classList.toggle("numbers"));
  showNumbers();
});

// Search: a match may begin in one token and end in another.

const texts = new Map();  // card -> its tokens, their joined text, and where each token begins in it
let hits = [], at = -1;

function textOf(card) {
  if (!texts.has(card)) {
    const tokens = [...card.querySelectorAll(".t")], starts = [];
    let text = "";
    for (const token of tokens) {
      starts.push(text.length);
      text += token.textContent.toLowerCase().replace(/[␣↵⇥]/g, " ");  // a blank finds a line's end as well
    }
    texts.set(card, { tokens, text, starts });
  }
  return texts.get(card);
}

function search() {
  for (const el of main.querySelectorAll(".hit")) el.classList.remove("hit", "now");
  const wanted = find.value.toLowerCase();
  hits = [];
  at = -1;
  for (const card of wanted ? cards : []) {
    if (card.hidden) continue;
    const { tokens, text, starts } = textOf(card);
    let token = 0;
    for (let from = text.indexOf(wanted); from >= 0; from = text.indexOf(wanted, from + wanted.length)) {
      while (token + 1 < tokens.length && starts[token + 1] <= from) token++;
      const hit = [];
      for (let i = token; i < tokens.length && starts[i] < from + wanted.length; i++) hit.push(tokens[i]);
      for (const el of hit) el.classList.add("hit");
      hits.push(hit);
    }
  }
  for (const id of ["previous", "next"]) byId(id).disabled = hits.length === 0;
  byId("found").value = !wanted ? "" : hits.length ? `${hits.length} found` : "not found";
}

function goTo(step) {
  if (!hits.length) return;
  for (const el of hits[at] ?? []) el.classList.remove("now");
  at = at < 0 ? (step > 0 ? 0 : hits.length - 1) : (at + step + hits.length) % hits.length;
  for (const el of hits[at]) el.classList.add("now");
  hits[at][0].scrollIntoView({ block: "center" });
  byId("found").value = `${at + 1} of ${hits.length}`;
}

find.addEventListener("input", search);
find.addEventListener("keydown", (event) => { if (event.key === "Enter") goTo(event.shiftKey ? -1 : 1); });
byId("previous").addEventListener("click", () => goTo(-1));
byId("next").addEventListener("click", () => goTo(1));

// Tokens and the line of their values

const tokensOf = (inside) => [...inside.closest("article").querySelectorAll(".t")];

function cursor(token, on) {
  const svg = token.closest("article").querySelector("svg"), line = svg.querySelector(".cursor");
  const all = tokensOf(token), own = all.slice(0, all.indexOf(token)).filter((el) => !el.classList.contains("env"));
  const last = Math.max(svg.viewBox.baseVal.width - 1, 0);  // an environment's tokens take no time
  line.setAttribute("transform", `translate(${Math.min(own.length, last)} 0)`);
  line.setAttribute("visibility", on ? "visible" : "hidden");
}

function showTip(token) {
  const { delta: error, value, paid } = token.dataset;
  const delta = Number(error), bytes = [...token.querySelectorAll(".byte")].map((el) => el.title.slice(5, 7));
  const verdict = delta > 0 ? "  better than expected" : delta < 0 ? "  worse than expected" : "";
  const text = token.textContent + (bytes.length ? `  bytes ${bytes.join(" ")}, no character by themselves` : "");
  tip.textContent = `token ${tokensOf(token).indexOf(token)}   ${text}\n` + (value === undefined
    ? "written by the environment"
    : `V(s_t)  ${format(value, digits + 1)}\n` +
      `δ_t     ${format(error, digits + 1, true)}${verdict}`) +
    (paid === undefined ? "" : `\nreward  ${paid}  paid after this token`);
  tip.hidden = false;
  const box = token.getClientRects()[0];
  const left = Math.min(box.left, root.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + tip.offsetHeight + 8 < innerHeight;
  tip.style.left = Math.max(left, 8) + scrollX + "px";
  tip.style.top = (below ? box.bottom + 5 : box.top - tip.offsetHeight - 5) + scrollY + "px";
  cursor(token, true);
}

function hideTip(token) {
  tip.hidden = true;
  cursor(token, false);
}

for (const [enter, leave] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
  main.addEventListener(enter, (event) => { const t = event.target.closest(".t"); if (t) showTip(t); });
  main.addEventListener(leave, (event) => { const t = event.target.closest(".t"); if (t) hideTip(t); });
}

function focusOn(token) {
  for (const el of token.closest("article").querySelectorAll(".t[tabindex]")) el.removeAttribute("tabindex");
  token.tabIndex = 0;
  token.focus();
}

main.addEventListener("keydown", (event) => {
  const token = event.target.closest(".t");
  if (!token) return;
  if (event.key === "Escape") return hideTip(token);
  const all = tokensOf(token), index = all.indexOf(token);
  const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: all.length - 1 }[event.key];
  if (next === undefined || !all[next]) return;
  event.preventDefault();
  focusOn(all[next]);
});

// A click on the line leads to its token.
main.addEventListener("click", (event) => {
  const svg = event.target.closest(".chart")?.querySelector("svg");
  if (!svg) return;
  const box = svg.getBoundingClientRect(), length = svg.viewBox.baseVal.width;
  const own = tokensOf(svg).filter((el) => !el.classList.contains("env"));
  const place = Math.round((event.clientX - box.left) / box.width * length);
  if (own.length) focusOn(own[Math.min(Math.max(place, 0), own.length - 1)]);
});

// Settings in the address, such as #mode=delta&sort=surprise.
const settings = new URLSearchParams(location.hash.slice(1));
if (settings.get("tools") === "off") body.dataset.tools = "off";
const theme = settings.get("theme") ?? remembered();
for (const group of groups) pick(group, group.dataset.group === "theme" ? theme : settings.get(group.dataset.group));
find.value = settings.get("find") ?? "";
const only = settings.get("only")?.split(",");
for (const card of only === undefined ? [] : cards)
  card.classList.toggle("left-out", !only.includes(String(Number(card.dataset.order) + 1)));
apply();
"""
