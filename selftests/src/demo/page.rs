// SPDX-License-Identifier: GPL-2.0
//! The report as one self-contained HTML page: what was measured in three sentences, the costs as
//! bars, the pressure on one shared axis of steps, and the tables.

use std::fmt::Write as _;

use anyhow::{Context, Result};

use super::story::{Course, Sample, Step, Story};
use super::table::{self, escaped, mib};
use super::{Figure, Real, Report, Row, plot};
use crate::MIB;

/// The style of all pages, and that of these.
const STYLE: &str = concat!(
    include_str!("../../../scripts/page.css"),
    "
@media screen { body { max-width: 72em; } }
th { max-width: 8em; }
.name { font-weight: bold; } .band { fill: var(--band); }
.memory { stroke: var(--blue); } .swap { stroke: var(--orange); } .blocks { stroke: var(--green); }
.allocated { stroke: var(--grey); stroke-width: 6; }
polyline { fill: none; stroke-width: 2; } .dot { fill: var(--back); stroke-width: 1.5; }
.bar { fill: var(--blue); } .bar.none { fill: var(--line); }
.hit { fill: transparent; } .hit:hover { fill: var(--dim); fill-opacity: 0.15; }
p.notes { white-space: pre-line; color: var(--dim); }
"
);

/// Summary, bars, course of the story, tables, and a section that another program has made.
pub fn html(report: &Report, section: &str) -> Result<String> {
    let costs = table::costs(report).html();
    let pressure = table::pressure(&report.story).html();
    let (summary, bars) = (summary(report)?, bars(&report.rows)?);
    let chart = chart(&report.story)?;
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=en>\n<meta charset=utf-8>\n\
         <meta name=viewport content=\"width=device-width\">\n<title>memfile demo</title>\n\
         <style>{STYLE}</style>\n<h1>Guest memory: cost and behaviour under pressure</h1>\n\
         {summary}<h2>Cost</h2>\n{bars}<div class=scroll>{costs}</div>\n\
         <h2>Under pressure</h2>\n{chart}<div class=scroll>{pressure}</div>\n{section}</html>\n"
    ))
}

/// Table and plot of real guests.
pub fn real_html(real: &Real) -> Result<String> {
    let table = table::real(real).html();
    let plot = plot::svg(&real.story, "A real Linux in a real QEMU")?;
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=en>\n<meta charset=utf-8>\n<title>memfile</title>\n\
         <style>{STYLE}</style>\n<h1>A real guest on memory of every kind</h1>\n\
         {table}{plot}\n</html>\n"
    ))
}

/// The summary, made from the figures: the measurement, the cost, the effect of pressure.
fn summary(report: &Report) -> Result<String> {
    let mut out = format!(
        "<p id=summary>The same guest ran on {} kinds of memory, and under pressure on {}, on Linux {} in \
         a machine of {} MiB; every figure is one of the kernel's. ",
        report.rows.len(),
        report.story.courses.len(),
        escaped(&report.kernel),
        report.machine / MIB
    );
    // The highest and the lowest cost of a guest of the usual size before it ran.
    let usual: Vec<_> = report.rows.iter().filter(|row| row.touched == row.size / 4).collect();
    let before = |row: &&&Row| bytes(row.after_creation);
    if let (Some(least), Some(most)) =
        (usual.iter().min_by_key(before), usual.iter().max_by_key(before))
    {
        write!(
            out,
            "Before a guest of {} MiB ran, its memory cost the host from {} MiB ({}) to {} MiB ({}); \
             after the guest wrote a quarter of it, {} and {} MiB. ",
            least.size / MIB,
            mib(bytes(least.after_creation)),
            escaped(&least.name),
            mib(bytes(most.after_creation)),
            escaped(&most.name),
            mib(bytes(least.after_write)),
            mib(bytes(most.after_write)),
        )?;
    }
    // A smaller figure is shown as 0: it is pages of the test program.
    let swapped = |course: &&Course| course.samples.iter().any(|s| s.swapped >= MIB / 2);
    let (gone, stayed): (Vec<_>, Vec<_>) = report.story.courses.iter().partition(swapped);
    let names = |courses: &[&Course]| match courses {
        [] => "none".to_owned(),
        some => some.iter().map(|course| escaped(&course.name)).collect::<Vec<_>>().join("; "),
    };
    writeln!(
        out,
        "When the host wanted memory back, these gave pages to swap: {}; and these kept all: {}; {}.</p>",
        names(&gone),
        names(&stayed),
        if report.is_right() {
            "every guest read what it had written"
        } else {
            "<strong>a guest read something else than it had written</strong>"
        }
    )?;
    Ok(out)
}

/// The object's own counter, or the machine's where there is none.
fn bytes(figure: Figure) -> i64 {
    figure.by_object.map_or(figure.by_machine, |bytes| bytes as i64)
}

/// A figure for each kind of memory and step, as bars of one scale.
fn bars(rows: &[Row]) -> Result<String> {
    const STEPS: [&str; 5] =
        ["created", "wrote a quarter", "half punched", "touched again", "VM gone"];
    const NAME: i64 = 210;
    const CELL: i64 = 150;
    const LINE: i64 = 26;
    const HEAD: i64 = 24;
    let figures = |row: &Row| {
        let (created, written) = (Some(row.after_creation), Some(row.after_write));
        [created, written, row.after_punch, row.after_touch_again, Some(row.after_end)]
            .map(|figure| figure.map(bytes))
    };
    let most = rows.iter().flat_map(figures).flatten().max().unwrap_or(0).max(1);
    let height = HEAD + LINE * rows.len() as i64;
    let mut out = format!(
        "<svg id=bars viewBox=\"0 0 {} {height}\" role=img>\n<title>Host memory in MiB, step by step</title>\n",
        NAME + CELL * STEPS.len() as i64
    );
    for (column, step) in (0..).zip(STEPS) {
        writeln!(out, "<text class=dim x={} y=14>{step}</text>", NAME + CELL * column)?;
    }
    for (line, row) in (0..).zip(rows) {
        let y = HEAD + LINE * line;
        writeln!(out, "<text class=name x=0 y={}>{}</text>", y + 15, escaped(&row.name))?;
        for ((column, figure), step) in (0..).zip(figures(row)).zip(STEPS) {
            let Some(figure) = figure else { continue };
            let (x, width) = (NAME + CELL * column, (figure.max(0) * (CELL - 60) / most).max(1));
            let class = if figure >= MIB as i64 / 2 { "bar" } else { "bar none" };
            let text = mib(figure);
            writeln!(
                out,
                "<g><title>{}, {step}: {text} MiB</title><rect class=\"{class}\" x={x} y={} width={width} \
                 height=16 /><text x={} y={}>{text}</text></g>",
                escaped(&row.name),
                y + 2,
                x + width + 5,
                y + 15
            )?;
        }
    }
    Ok(out + "</svg>\n")
}

/// A line of a chart: its class and its value; none where the kernel has no figure.
type Line = (&'static str, fn(&Sample) -> Option<f64>);

const MEMORY: [Line; 3] = [
    ("allocated", |sample| sample.allocated.map(in_mib)),
    ("memory", |sample| Some(in_mib(sample.resident))),
    ("swap", |sample| Some(in_mib(sample.swapped))),
];
const BLOCKS: [Line; 1] = [("blocks", |sample| Some(sample.free_2m_blocks as f64))];

fn in_mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

/// All courses above each other, on one axis of steps with the host's events marked.
fn chart(story: &Story) -> Result<String> {
    const LEFT: i64 = 210;
    const WIDTH: i64 = 740;
    const TOP: i64 = 78;
    const ROW: i64 = 118;
    let Some(longest) = story.courses.iter().max_by_key(|course| course.samples.len()) else {
        return Ok("<p>No course of the story could be run.</p>\n".into());
    };
    let steps = longest.samples.len() as i64;
    let at = |step: i64| LEFT + WIDTH * step / (steps - 1).max(1);
    let height = TOP + ROW * story.courses.len() as i64;
    let mut out = format!(
        "<svg id=pressure viewBox=\"0 0 {} {height}\" role=img>\n\
         <title>A guest of {} MiB under pressure, step by step</title>\n",
        LEFT + WIDTH + 50,
        story.size / MIB
    );
    let legend = [
        ("memory", "resident, MiB"),
        ("swap", "swapped, MiB"),
        ("allocated", "allocated, in memory or in swap"),
        ("blocks", "free blocks of 2 MiB in the machine"),
    ];
    for ((class, text), x) in legend.into_iter().zip([0, 150, 300, 560]) {
        writeln!(
            out,
            "<polyline class={class} points=\"{x},10 {},10\" /><text x={} y=14>{text}</text>",
            x + 24,
            x + 30
        )?;
    }

    // The event before a step, as a band behind all courses.
    let mut last = String::new();
    for (n, sample) in (0..).zip(&longest.samples) {
        let event = match sample.step {
            Step::Reclaimed => format!("host wants {} MiB each time", story.wanted / MIB),
            Step::Punched => "guest gives back".into(),
            Step::Compacted => "host compacts".into(),
            _ => String::new(),
        };
        writeln!(
            out,
            "<text class=dim text-anchor=middle x={} y={}>{}</text>",
            at(n),
            if n % 2 == 0 { 36 } else { 52 },
            sample.step.name()
        )?;
        if !event.is_empty() && n > 0 {
            writeln!(
                out,
                "<g class=event><title>{event}</title><rect class=band x={} y={TOP} width={} height={} /></g>",
                at(n - 1),
                at(n) - at(n - 1),
                height - TOP - 6
            )?;
            // One label for several steps of a kind.
            if event != last {
                // The compaction follows the step that gives memory back, whose label needs the
                // room before it.
                let x = if sample.step == Step::Compacted { at(n) + 6 } else { at(n - 1) };
                writeln!(out, "<text x={x} y={}>{event}</text>", TOP - 6)?;
            }
        }
        last = event;
    }

    let every = || story.courses.iter().flat_map(|course| &course.samples);
    let most = every().flat_map(|s| MEMORY.iter().filter_map(|line| line.1(s))).fold(1.0, f64::max);
    let blocks = || every().map(|sample| sample.free_2m_blocks as f64);
    let (low, high) = (blocks().fold(f64::INFINITY, f64::min), blocks().fold(0.0, f64::max));
    for (n, course) in (0..).zip(&story.courses) {
        let top = TOP + ROW * n;
        writeln!(out, "<text class=name x=0 y={}>{}</text>", top + 20, escaped(&course.name))?;
        writeln!(out, "<path class=axis d=\"M{LEFT} {0}H{1}\" />", top + 72, LEFT + WIDTH)?;
        let end = LEFT + WIDTH + 6;
        writeln!(out, "<text class=dim x={end} y={}>{most:.0} MiB</text>", top + 16)?;
        lines(&mut out, course, &MEMORY, &at, |value| (top + 72) as f64 - 62.0 * value / most)?;
        // The axis does not begin at 0: the differences matter, not the size of the machine.
        let scale = (high - low).max(1.0);
        lines(&mut out, course, &BLOCKS, &at, |value| {
            (top + 106) as f64 - 26.0 * (value - low) / scale
        })?;
        writeln!(out, "<text class=dim x={end} y={}>{high:.0}</text>", top + 84)?;
        writeln!(out, "<text class=dim x={end} y={}>{low:.0}</text>", top + 110)?;
        for (n, sample) in (0..).zip(&course.samples) {
            let (x, half) = (at(n), WIDTH / (steps - 1).max(1) / 2);
            let allocated =
                sample.allocated.map_or("unknown".into(), |bytes| mib(bytes as i64) + " MiB");
            writeln!(
                out,
                "<rect class=hit x={} y={top} width={} height={}><title>{}, {}: resident {} MiB, swapped {} MiB, \
                 allocated {allocated}, {} free blocks of 2 MiB</title></rect>",
                x - half,
                2 * half,
                ROW - 8,
                escaped(&course.name),
                sample.step.name(),
                mib(sample.resident as i64),
                mib(sample.swapped as i64),
                sample.free_2m_blocks
            )?;
        }
    }
    Ok(out + "</svg>\n")
}

fn lines(
    out: &mut String,
    course: &Course,
    lines: &[Line],
    x: &dyn Fn(i64) -> i64,
    y: impl Fn(f64) -> f64,
) -> Result<()> {
    for (class, value) in lines {
        let points: Vec<_> = (0..)
            .zip(&course.samples)
            .filter_map(|(n, sample)| Some((x(n), y(value(sample)?))))
            .collect();
        let list: Vec<_> = points.iter().map(|(x, y)| format!("{x},{y:.1}")).collect();
        writeln!(out, "<polyline class={class} points=\"{}\" />", list.join(" "))
            .context("write")?;
        if *class != "allocated" {
            for (x, y) in points {
                writeln!(out, "<circle class=\"dot {class}\" cx={x} cy={y:.1} r=2.5 />")
                    .context("write")?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_has_everything_and_needs_nothing_else() {
        let html = html(&table::tests::report(), "<p>more</p>").unwrap();
        for part in [
            "<p>more</p></html>",
            "<p id=summary>",
            "<svg id=bars",
            "<svg id=pressure",
            "a, b",
            "d, &lt;e&gt;",
            "free blocks of 2 MiB",
            "given back",
            "prefers-color-scheme: dark",
            "@media print",
        ] {
            assert!(html.contains(part), "{part} is not in {html}");
        }
        for link in ["src=", "href=", "@import", "url(", "<script"] {
            assert!(!html.contains(link), "{link} is in {html}");
        }
    }

    #[test]
    fn page_of_real_guests_has_table_and_plot_and_needs_nothing_else() {
        let html = real_html(&table::tests::real_guests()).unwrap();
        for part in [
            "<caption>Linux 6.12 &lt;stock&gt; in QEMU, 512 MiB; MiB. ",
            "<th>host wanted half: resident</th>",
            "<td class=word>private, &lt;both&gt;</td><td>21</td><td>22</td><td>23</td><td>24</td>\
             <td>25</td><td>35</td><td>26</td><td>42</td><td>19</td><td>27</td>\
             <td>yes</td></tr>",
            "private, huge pages: not shown, no pool &amp; none to be had",
            "A real Linux in a real QEMU, 512 MiB",
            "</svg>",
        ] {
            assert!(html.contains(part), "{part} is not in {html}");
        }
        assert!(!html.contains("<td class=word>ended early"), "{html}");
        for link in ["src=", "href=", "@import", "url(", "<script"] {
            assert!(!html.contains(link), "{link} is in {html}");
        }
    }

    #[test]
    fn summary_is_made_of_the_figures() {
        let mut report = table::tests::report();
        let text = summary(&report).unwrap();
        assert!(text.contains("from 0 MiB (a, b) to 0 MiB (a, b)"), "{text}");
        assert!(text.contains("64 and 64 MiB"), "{text}");
        assert!(text.contains("to swap: none; and these kept all: d, &lt;e&gt;; "), "{text}");
        assert!(text.contains("<strong>a guest read something else"), "{text}");

        report.rows[0].own_data_elsewhere = true;
        report.story.courses[0].own_data = true;
        report.story.courses[0].samples[2].swapped = MIB;
        let text = summary(&report).unwrap();
        assert!(text.contains("to swap: d, &lt;e&gt;; and these kept all: none; "), "{text}");
        assert!(text.contains("every guest read what it had written.</p>"), "{text}");
    }

    #[test]
    fn report_without_rows_and_courses_is_a_page() {
        let mut report = table::tests::report();
        report.rows.clear();
        report.story.courses.clear();
        assert!(html(&report, "").unwrap().contains("No course"));
    }

    #[test]
    fn every_value_can_be_pointed_at() {
        let html = html(&table::tests::report(), "").unwrap();
        assert!(html.contains("<title>a, b, half punched: 32 MiB</title>"), "{html}");
        assert!(html.contains("d, &lt;e&gt;, given back: resident 1 MiB, swapped 0 MiB"), "{html}");
        assert!(html.contains("allocated unknown, 900 free blocks"), "{html}");
        assert_eq!(html.matches("<g class=event>").count(), 3);
    }
}
