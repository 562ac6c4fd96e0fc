"""How the page looks: its style sheet, and its frame around the body.

Laws
* Nothing here loads or runs anything, and the frame's policy forbids both to whatever the body holds.
* Light and dark differ in the colors of `:root` alone; every other rule names a color by its variable.
* `c0` to `c7`, `many`, `ink` and `soft` are the classes that give a curve, a bar or a dot its color.

Left out: the elements that it dresses (`page`, `charts`).
"""

from __future__ import annotations

from string import Template

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#1c1e22;--soft:#676c75;--line:#e5e5e0;--bad:#b3261e;
--c0:#2a78d6;--c1:#e06a2b;--c2:#179a6b;--c3:#8557d3;--c4:#c98500;--c5:#d5508a;--c6:#0f8fa8;--c7:#6f8f1d;--many:#8fb2dc}
@media(prefers-color-scheme:dark){:root{--page:#131416;--card:#1c1d20;--ink:#ededea;--soft:#9da2ab;--line:#303338;
--bad:#ff8a80;--c0:#5a9ff0;--c1:#f0854a;--c2:#35b886;--c3:#a585ea;--c4:#dba028;--c5:#ea74a6;--c6:#3db4cb;--c7:#9bb84a;
--many:#41618a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:clamp(20px,5vw,56px) 16px;display:grid;gap:16px;grid-template-columns:100%}
header{padding:0 4px 12px}
h1{font-size:clamp(1.45rem,1rem + 2.2vw,2.3rem);line-height:1.2;letter-spacing:-.015em;font-weight:650;margin:.3em 0 0;
max-width:26em;text-wrap:balance}
h2{font-size:1rem;font-weight:600;margin:0}
p{margin:0}header p,figcaption p,.card>p,small,summary,footer{color:var(--soft)}small{font-size:.8rem;display:block}
.notice{color:var(--bad);margin-top:.8em;font-weight:600;overflow-wrap:anywhere}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px;margin:0;min-width:0}
.card>p{font-size:.875rem;margin-bottom:14px}.card>p:last-child{margin:10px 0 0}
figcaption p{font-size:.875rem}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:1px;margin:0;padding:0;overflow:hidden}
.tiles>div{box-shadow:0 0 0 1px var(--line);padding:16px 20px;min-width:0}
.tiles dt{color:var(--soft);font-size:.8rem}.tiles dd{margin:0}
.tiles b{display:block;font-size:1.55rem;font-weight:620;letter-spacing:-.01em;line-height:1.35}
.charts:empty{display:none}
.charts{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.plot{padding:18px 10px 26px 54px}.plot svg{display:block;width:100%;height:220px;overflow:visible}
.plot text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums;text-anchor:middle}
.plot .y{text-anchor:end}
.plot line{stroke:var(--line)}.plot .level{stroke:var(--soft);stroke-dasharray:2 4;stroke-width:1.5}
.plot circle{fill:var(--ink);stroke:var(--card);stroke-width:2}
path{fill:none;stroke:var(--c);stroke-width:1.75;stroke-linejoin:round;vector-effect:non-scaling-stroke}
path.ink{stroke-width:2.5}path.soft{stroke-dasharray:5 4}path.dash{stroke-dasharray:9 7}
path.many{stroke-width:1;opacity:.7}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.c7{--c:var(--c7)}.many{--c:var(--many)}.ink{--c:var(--ink)}.soft{--c:var(--soft)}
.key{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:0;padding:0;font-size:.8rem;color:var(--soft)}
.key li{display:flex;align-items:center;gap:6px;min-width:0}i{flex:none;width:14px;height:3px;border-radius:2px;
background:var(--c)}i.level,i.soft{background:repeating-linear-gradient(90deg,var(--soft) 0 4px,transparent 4px 7px)}
bdi{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;max-width:16em}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,210px),1fr));gap:20px 28px}
.panels figure{margin:0;min-width:0}
.panels figcaption{display:flex;justify-content:space-between;gap:8px;margin-bottom:6px}
.panels bdi{font-weight:600;font-size:.875rem}.panels small{white-space:nowrap}
.bars{display:block;width:100%;height:76px;border-bottom:1px solid var(--line)}.bars rect{fill:var(--c)}
.ends{display:flex;justify-content:space-between;font-size:12px;color:var(--soft)}
.lanes{display:grid;grid-template-columns:minmax(0,max-content) max-content minmax(0,1fr);gap:8px 16px;
align-items:center;font-size:.875rem}.lanes bdi{font-weight:500}
.lanes small{color:var(--soft);text-align:right;font-variant-numeric:tabular-nums}
.lane{display:block;width:100%;height:18px;border-radius:3px;background:var(--page)}.lane rect{fill:var(--c)}
.ticks{display:block;width:100%;height:16px;overflow:visible;grid-column:-2}
.ticks text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums;text-anchor:middle}
.wide,.events{overflow:auto;max-width:100%}.events{max-height:330px;margin-top:8px}
table{border-collapse:collapse;width:100%;font-size:.875rem;margin-top:8px}
th,td{padding:7px 10px;text-align:left;border-bottom:1px solid var(--line);vertical-align:baseline}
th:first-child{padding-left:0}tbody tr:last-child>*{border-bottom:0}thead th{color:var(--soft);font-weight:500;
font-size:.8rem;white-space:nowrap}tbody th{font-weight:500}
.numbers th{white-space:nowrap}.numbers :is(td,th+th){text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
tbody th i{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:8px}
.numbers bdi{display:inline-block;vertical-align:bottom}.words td:last-child{min-width:16em;color:var(--soft)}
.words td{overflow-wrap:break-word;min-width:8em;max-width:26em}.words td+td{color:var(--soft)}
code{font:.85em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
ol{list-style:none;margin:0;padding:0;font-size:.875rem}
ol li{display:grid;grid-template-columns:5.2em 6.6em minmax(0,1fr);gap:4px 10px;padding:5px 0;border-bottom:1px solid
var(--line)}ol li:last-child{border:0}time{color:var(--soft);font-variant-numeric:tabular-nums}ol span,ol b{
overflow-wrap:anywhere}ol b{font-weight:500}ol .bad{color:var(--bad)}
summary{cursor:pointer;margin-top:14px;font-size:.875rem}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:12px 20px;margin:8px 0 0}
.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;overflow-wrap:anywhere}
footer{font-size:.8rem;padding:0 4px}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px;border-radius:4px}
@media(max-width:640px){.card{padding:16px}.tiles{padding:0;grid-template-columns:1fr 1fr}
.tiles>div{padding:14px 16px}
.lanes{grid-template-columns:minmax(0,1fr) max-content;gap:2px 16px}.lanes svg{grid-column:1/-1}.lane{margin-bottom:8px}
ol li{grid-template-columns:5.2em 1fr}ol span{grid-column:1/-1}}
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';style-src 'unsafe-inline';img-src data:">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title: run report</title>
<style>$style</style>
</head>
<body>
<main>
$body
<footer>All figures, and the points of every curve, are in report.json beside this page.</footer>
</main>
</body>
</html>
""")
