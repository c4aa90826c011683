"""The style sheet of reports: one column, light and dark."""

STYLE = """\
:root { color-scheme: light dark; --text: #1a1a1a; --page: #ffffff; --quiet: #595959;
  --line: #d0d0d0; --box: #f4f4f4; --bar: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --page: #16181c; --quiet: #a8a8a8;
  --line: #44474d; --box: #22252b; --bar: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
figure { margin: 0.5rem 0; }
pre { background: var(--box); padding: 0.6rem 0.8rem; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; }
dt, caption, footer { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.3rem 0; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; font-weight: normal; }
th:first-child { text-align: left; }
thead th { font-weight: 600; }
.bars { width: 100%; max-width: 40rem; margin: 1rem 0; }
.bar { width: 100%; }
.bar span { display: block; height: 1em; background: var(--bar); border-radius: 2px; }
.sample { margin: 0.8rem 0; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: 0.4rem 0; }
footer { margin-top: 2rem; font-size: 0.85rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.4rem; } }
"""
