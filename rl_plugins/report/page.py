"""Template of the token-value page: no network, no fonts of its own, opens anywhere."""

CARD = """<article data-order="$order" data-reward="$reward" data-surprise="$surprise"
 data-verdict="$verdict">
<header><h2>#$number</h2><span class="badge $verdict">$badge</span><span class=fact>$count</span>$facts
<figure title="V(s_t) over the completion; $aim">$spark</figure></header>
<details$open><summary>Prompt</summary><div class=prompt>$prompt</div></details>
<div class=tokens role=group aria-label="Completion $number; arrow keys move between tokens">$tokens</div>
</article>"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
$css</style></head>
<body data-mode="value" data-digits="$digits">
<div class=head><h1>$title</h1>$subtitle</div>
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

CSS = """:root{--page:#fff;--ink:#1c2128;--soft:#59636e;--line:#d5dae0;--card:#fff;--well:#f4f6f8;
--accent:#0b4a80;
--on-accent:#fff;--good:#0b4a80;--bad:#a3121f;--pay:#7a4a00;color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{--page:#14171c;--ink:#e4e8ee;--soft:#a3adb9;
--line:#363d47;
--card:#1b1f26;--well:#242a33;--accent:#8cc4f5;--on-accent:#10151b;--good:#8cc4f5;--bad:#ff9c8c;--pay:#f2c14e}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:0 20px 60px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
h1{font-size:24px;line-height:1.25;margin:26px 0 4px}h2{font-size:15px;margin:0}
.head p{margin:0 0 6px;color:var(--soft)}
.tools{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;gap:8px 18px;align-items:center;
padding:10px 0;margin-bottom:14px;background:var(--page);border-bottom:1px solid var(--line)}
[data-group]{display:flex;align-items:center}[data-group] span{color:var(--soft);font-size:13px;
margin-right:7px}
button{font:inherit;font-size:13px;padding:3px 11px;border:1px solid var(--line);background:var(--card);
color:var(--ink);cursor:pointer;border-radius:6px}
[data-group] button{border-radius:0;margin-left:-1px}
[data-group] button:first-of-type{border-radius:6px 0 0 6px}
[data-group] button:last-of-type{border-radius:0 6px 6px 0}
button:hover{background:var(--well)}
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
article{border:1px solid var(--line);border-radius:10px;background:var(--card);padding:12px 16px 16px;
margin:0 0 16px}
header{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:center;min-height:48px}
.badge{font-size:13px;font-weight:600;padding:1px 10px;border-radius:99px;border:1.5px solid;
white-space:nowrap}
.badge.right{color:var(--good)}.badge.wrong{color:var(--bad);border-style:dashed}
.fact{font-size:13px;color:var(--soft);overflow-wrap:anywhere}.fact b{font-weight:600}
figure{margin:0 0 0 auto}svg{display:block;width:298px;height:44px;overflow:visible}
svg text{font-size:10px;text-anchor:end;fill:var(--soft)}
.curve{fill:none;stroke:var(--accent);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.zero{stroke:var(--line);fill:none}.cursor{stroke:var(--ink);stroke-width:1}
.stairs{fill:none;stroke:var(--pay);stroke-width:1.4;stroke-dasharray:3 1.5}
svg circle{fill:var(--card);stroke:var(--ink);stroke-width:1.6}
details{margin:2px 0 10px}summary{cursor:pointer;font-size:13px;color:var(--soft)}
.prompt{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--well);border-radius:6px;padding:8px 12px;
margin-top:4px;font-size:14px}
.tokens{line-height:2;overflow-wrap:anywhere;
font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",
"DejaVu Sans Mono",monospace;font-size:14px}
.t{unicode-bidi:isolate;padding:3px 1px;margin-right:1px;border-radius:3px;cursor:default;position:relative;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
.t i{font-style:normal}.special{font-size:12px;border:1px dotted currentColor}
.t:hover,.t:focus{outline:2px solid var(--ink);outline-offset:0;z-index:1}
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
.numbers .tokens{line-height:1.3}.numbers .t{display:inline-block;text-align:center;margin:0 2px 5px 0;
padding:1px 3px}
.numbers .t::after{content:attr(data-n);display:block;font-size:11px;font-variant-numeric:tabular-nums}
.numbers .t.env{vertical-align:top}.numbers .t.env::after{content:none}
#tip{position:absolute;z-index:3;pointer-events:none;background:var(--ink);color:var(--page);padding:6px 10px;
border-radius:6px;font-size:13px;line-height:1.45;white-space:pre;font-variant-numeric:tabular-nums;
max-width:90vw;
overflow:hidden}
[hidden]{display:none!important}
.bar{-webkit-print-color-adjust:exact;print-color-adjust:exact}
@media (max-width:700px){.tools{position:static}}
@media print{.tools{position:static}[data-group],#numbers,#tip{display:none!important}
body{max-width:none;padding:0;font-size:11pt}header{break-after:avoid}}
"""

JS = r"""const body = document.body, main = document.querySelector("main");
const tip = document.getElementById("tip");
const digits = Number(body.dataset.digits);
const cards = [...main.querySelectorAll("article")];
const state = { mode: "value", show: "all", sort: "order" };

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
  const key = (card) => Number(card.dataset[state.sort]) || 0;
  const order = (a, b) => Number(a.dataset.order) - Number(b.dataset.order);
  const sorted = [...cards].sort((a, b) => (state.sort === "order" ? 0 : key(b) - key(a)) || order(a, b));
  main.append(...sorted);
  for (const card of cards) card.hidden = state.show !== "all" && card.dataset.verdict !== state.show;
  document.getElementById("none").hidden = cards.some((card) => !card.hidden);
  showNumbers();
}

for (const group of document.querySelectorAll("[data-group]"))
  group.addEventListener("click", (event) => {
    const picked = event.target.closest("button");
    if (!picked) return;
    for (const button of group.querySelectorAll("button"))
      button.setAttribute("aria-pressed", button === picked);
    state[group.dataset.group] = picked.dataset.pick;
    apply();
  });

document.getElementById("numbers").addEventListener("click", (event) => {
  event.target.setAttribute("aria-pressed", body.classList.toggle("numbers"));
  showNumbers();
});

function cursor(token, on) {
  const svg = token.closest("article").querySelector("svg"), line = svg.querySelector(".cursor");
  const steps = Math.max(Number(svg.dataset.n) - 1, 1);
  const at = Number(token.dataset.x ?? token.dataset.i);  // an environment's tokens take no time
  line.setAttribute("transform", `translate(${240 * at / steps} 0)`);
  line.setAttribute("visibility", on ? "visible" : "hidden");
}

function showTip(token) {
  const { delta: error, value, paid } = token.dataset;
  const delta = Number(error);
  const verdict = delta > 0 ? "  better than expected" : delta < 0 ? "  worse than expected" : "";
  tip.textContent = `token ${token.dataset.i}   ${token.textContent}\n` + (value === undefined
    ? "written by the environment"
    : `V(s_t)  ${format(value, digits + 1)}\n` +
      `δ_t     ${format(error, digits + 1, true)}${verdict}`) +
    (paid === undefined ? "" : `\nreward  ${paid}  paid after this token`);
  tip.hidden = false;
  const box = token.getClientRects()[0];
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
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

main.addEventListener("keydown", (event) => {
  const token = event.target.closest(".t");
  if (!token) return;
  if (event.key === "Escape") return hideTip(token);
  const all = [...token.closest(".tokens").querySelectorAll(".t")], at = all.indexOf(token);
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (next === undefined || !all[next]) return;
  event.preventDefault();
  token.tabIndex = -1;
  all[next].tabIndex = 0;
  all[next].focus();
});
"""
