"""The page around the report's sections: one HTML file that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2430;--soft:#5c6675;--rule:#dde2e9;--wash:#f5f7fa;--mark:#1f5fbf;
--heat:36,107,206;--s0:#2f6fd6;--s1:#d4701e;--s2:#1f9a70;--s3:#a84fc0;--s4:#c8364c;--s5:#8d7a10;--s6:#2b9db3;--s7:#77808d}
@media (prefers-color-scheme:dark){:root{--paper:#14181f;--ink:#e4e8ee;--soft:#98a3b3;--rule:#2c3440;--wash:#1b212a;
--mark:#7fb0ff;--heat:84,150,255;--s0:#6ea4ff;--s1:#f0994f;--s2:#4cc79b;--s3:#cf88e3;--s4:#f2748a;--s5:#cdb94a;
--s6:#5fc9de;--s7:#a5aebb}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem clamp(1rem,4vw,3rem) 4rem;max-width:82rem;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.9rem;line-height:1.2;margin:0}
h2{font-size:1.25rem;margin:3rem 0 .4rem;padding-top:.9rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.8rem 0 .3rem}
p{max-width:52rem;margin:.4rem 0 .8rem}
.lead,.note,small{color:var(--soft)}
.note{font-size:.87rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:1rem 0 0;font-size:.9rem}
a{color:var(--mark);text-decoration:none}a:hover{text-decoration:underline}
.key{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.8rem;margin:1.6rem 0}
.key div{background:var(--wash);border:1px solid var(--rule);border-radius:.5rem;padding:.7rem .9rem}
.key b{display:block;font-size:1.7rem;line-height:1.25;font-variant-numeric:tabular-nums}
.key span{color:var(--soft);font-size:.87rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem;margin:.8rem 0;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0}
.scroll{overflow-x:auto;margin:.8rem 0;border:1px solid var(--rule);border-radius:.5rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{padding:.38rem .7rem;border-bottom:1px solid var(--rule);text-align:left;vertical-align:middle}
tbody tr:last-child>*{border-bottom:0}
thead th{background:var(--wash);font-weight:600;vertical-align:bottom}
tbody th{font-weight:500;white-space:nowrap;position:sticky;left:0;background:var(--paper)}
th small{display:block;font-weight:400;font-size:.78rem}
tbody th small{display:inline;margin-left:.5rem;padding:.05rem .4rem;border:1px solid var(--rule);border-radius:1rem}
.numbers td,.numbers thead th:not(:first-child){text-align:right;font-variant-numeric:tabular-nums}
.numbers .group{text-align:center!important;border-left:1px solid var(--rule)}
.numbers .first{border-left:1px solid var(--rule)}
.numbers b{color:var(--mark)}
.numbers tr.full>*,.numbers tr.mixed>*{color:var(--soft);font-style:italic}
.heat,.gallery,.published{width:auto}.scroll:has(.heat,.gallery,.published){width:fit-content;max-width:100%}
.heat td{padding:.3rem .5rem;min-width:2.9rem}
.heat .class{padding:.4rem .5rem}
.heat .class span{writing-mode:vertical-rl;transform:rotate(180deg);display:inline-block;text-align:left}
.heat .diagonal{outline:1px solid var(--rule);outline-offset:-1px;font-weight:600}
.words td{min-width:11rem;font-size:.86rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1.2rem 2rem}
figure{margin:.8rem 0;min-width:0}figcaption{font-weight:600;font-size:.92rem;margin-bottom:.3rem}
.chart{width:100%;height:auto;display:block}.chart text{font-size:11px;fill:var(--soft)}
.wide{max-width:52rem}
.grid{stroke:var(--rule);stroke-width:1;fill:none}.strong{stroke-width:3}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
ul{list-style:none;margin:.3rem 0;padding:0;display:flex;flex-wrap:wrap;gap:.15rem .9rem;font-size:.82rem}
.legend svg{width:22px;height:8px;margin-right:.35rem}
.tags i{display:inline-block;width:.75em;height:.75em;margin-right:.35em;border-radius:2px;border:1px solid var(--soft)}
tbody .tags{flex-direction:column;color:var(--soft);font-weight:400}
.gallery:not(.layers) tbody>tr>*{vertical-align:top;padding-top:.4rem}
.gallery td{padding:.25rem;text-align:center;color:var(--soft);border:0}
.gallery tbody tr+tr>*{border-top:1px solid var(--rule)}
.published td{white-space:nowrap;font-variant-numeric:tabular-nums}
.published :is(th,td):nth-child(4),.published :is(th,td):nth-child(5){text-align:right}
.pair{display:flex;gap:.25rem;margin-bottom:.25rem}
.gallery img{display:block;width:132px;max-width:none;height:auto;border-radius:3px;margin:auto}
.gallery .flat{image-rendering:pixelated}
.layers img{width:100px}
.layers tbody th{border:0}.layers tbody tr:not(:has([rowspan]))>*{border:0}
.layers tbody th small{display:block;width:max-content;max-width:11rem;margin:.2rem 0 0;white-space:normal;
border-radius:.6rem}
@media (max-width:45rem){.gallery tbody th{position:static}}
@media print{.scroll{overflow:visible}nav{display:none}}
""" + "".join(
    f".s{number}{{stroke:var(--s{number})}}circle.s{number}{{fill:var(--s{number})}}\n" for number in range(8)
)


def page(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """A whole HTML document. ``sections``: heading -> HTML, those that are empty are left out with their headings."""
    kept = {heading: body for heading, body in sections.items() if body}
    links = "".join(f'<a href="#{_anchor(heading)}">{escape(heading)}</a>' for heading in kept)
    bodies = "".join(
        f'<section id="{_anchor(heading)}"><h2>{escape(heading)}</h2>{body}</section>' for heading, body in kept.items()
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f'<body><header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p><nav>{links}</nav></header>'
        f"<main>{bodies}</main></body></html>\n"
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Terms and what they are."""
    return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{escape(words)}</dd>' for term, words in pairs)}</dl>"


def figures(pairs: Sequence[tuple[str, str]]) -> str:
    """Few large numbers, each with its words."""
    shown = "".join(f"<div><b>{escape(number)}</b><span>{escape(words)}</span></div>" for number, words in pairs)
    return f'<div class="key">{shown}</div>' if pairs else ""


def note(words: str) -> str:
    """A remark in small type."""
    return f'<p class="note">{escape(words)}</p>'


def _anchor(heading: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in heading.lower())
