"""The style sheet of the report page: one column, light and dark, legible in print."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root{color-scheme:light dark;--ink:#1d2129;--soft:#555d6b;--ground:#fff;--panel:#f5f6f8;--rule:#d9dce2;
--good:#00694c;--good-ground:#dff3ea;--bad:#a33c00;--bad-ground:#fde8db}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaef;--soft:#a6adba;--ground:#14161a;--panel:#1d2026;
--rule:#363b45;--good:#5fd3a8;--good-ground:#10322a;--bad:#ff9c66;--bad-ground:#3d2010}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:2rem 1.25rem 4rem;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .6rem}
h2{font-size:1.15rem;margin:2.4rem 0 .6rem}
p{margin:.4rem 0;max-width:75ch}
.soft,small{color:var(--soft)}
small{display:block;font-size:.82rem;line-height:1.35;font-weight:400;max-width:48ch}
.badge{display:inline-block;padding:.15rem .6rem;border-radius:1rem;font-weight:600;white-space:nowrap}
.good{background:var(--good-ground);color:var(--good)}
.bad{background:var(--bad-ground);color:var(--bad)}
.none{background:var(--panel);color:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem;margin:1rem 0 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;vertical-align:top;padding:.45rem .6rem;border-bottom:1px solid var(--rule)}
thead th,thead th.n{color:var(--soft);font-weight:600;white-space:normal;vertical-align:bottom;
border-bottom-width:2px}
td:first-child{white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
figure{margin:0 0 1.2rem}
figure img{display:block;max-width:100%;height:auto;border-radius:6px}
figcaption{color:var(--soft);font-size:.88rem;margin:.3rem 0 0}
.plots{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start;margin:0 0 1rem}
.plots svg{background:var(--panel);border-radius:6px;max-width:100%;height:auto}
details{margin:.8rem 0}
summary{cursor:pointer;font-weight:600}
@media print{body{max-width:none;padding:0}.plots svg,figure,tr{break-inside:avoid}}
"""
