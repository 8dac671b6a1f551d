// SPDX-License-Identifier: GPL-2.0
//! The report as tables for people and as CSV.

use std::fmt::Write as _;

use super::story::{Course, Step, Story};
use super::{Figure, Missing, Real, Report, Row};
use crate::MIB;

/// Bytes as MiB, with one decimal unless that is 0.
pub(super) fn mib(bytes: i64) -> String {
    let tenths = (bytes.abs() * 10 + MIB as i64 / 2) / MIB as i64;
    let sign = if bytes < 0 && tenths > 0 { "-" } else { "" };
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{sign}{whole}"),
        (whole, tenth) => format!("{sign}{whole}.{tenth}"),
    }
}

/// The object's own counter, or the machine's where there is none.
fn best(figure: Figure) -> String {
    mib(figure.by_object.map_or(figure.by_machine, |bytes| bytes as i64))
}

fn yes(fact: bool) -> &'static str {
    if fact { "yes" } else { "NO" }
}

/// The same where there may be no figure.
fn maybe<T>(known: Option<T>, text: impl Fn(T) -> String) -> String {
    known.map_or("-".into(), text)
}

/// A table, its title and its notes.
pub struct Table {
    title: String,
    /// Column heads, each of three lines.
    heads: &'static [[&'static str; 3]],
    /// Columns of words; the others are figures.
    words: &'static [usize],
    rows: Vec<Vec<String>>,
    notes: Vec<String>,
}

/// The table of costs.
pub fn costs(report: &Report) -> Table {
    const HEADS: [[&str; 3]; 11] = [
        ["", "", "guest memory"],
        ["", "", "size"],
        ["", "after", "creation"],
        ["guest", "wrote a", "quarter"],
        ["half of", "that", "punched"],
        ["guest", "touched", "it again"],
        ["", "VM is", "gone"],
        ["zeros", "in the", "hole"],
        ["own data", "else-", "where"],
        ["kernel", "can", "read it"],
        ["", "", "read from"],
    ];
    let cells = |row: &Row| {
        vec![
            row.name.clone(),
            mib(row.size as i64),
            best(row.after_creation),
            best(row.after_write),
            maybe(row.after_punch, best),
            maybe(row.after_touch_again, best),
            best(row.after_end),
            maybe(row.hole_reads_zeros, |fact| yes(fact).into()),
            yes(row.own_data_elsewhere).into(),
            maybe(row.kernel_reads_it, |fact| if fact { "yes" } else { "no" }.into()),
            row.source.clone(),
        ]
    };
    let mut notes = absent(&report.missing);
    let others: Vec<_> = report.rows.iter().filter(|row| row.touched != row.size / 4).collect();
    if let Some(row) = others.first() {
        let sizes: Vec<_> = others.iter().map(|row| (row.size / MIB).to_string()).collect();
        notes.push(format!(
            "\nOf {} MiB the guest writes {} MiB instead of a quarter; of 32 GiB they are spread all over.",
            sizes.join(" and "),
            row.touched / MIB
        ));
    }
    if report.rows.iter().any(|row| row.after_punch.is_none()) {
        notes.push(
            "No guest runs on memfd_secret, KVM refuses that: a process writes instead, and it can have no hole."
                .into(),
        );
    }
    if report.rows.iter().any(|row| row.kernel_reads_it.is_some()) {
        notes.push(
            "\"Kernel can read it\": what the guest wrote is in physical memory, read through the direct map."
                .into(),
        );
    }
    notes.push("\"VM is gone\" is measured after everything is closed, from /proc/meminfo.".into());
    Table {
        title: format!(
            "Host memory in MiB; Linux {}, a machine of {} MiB.",
            report.kernel,
            report.machine / MIB
        ),
        heads: &HEADS,
        words: &[0, 10],
        rows: report.rows.iter().map(cells).collect(),
        notes,
    }
}

/// The table of pressure.
pub fn pressure(story: &Story) -> Table {
    const HEADS: [[&str; 3]; 12] = [
        ["", "", "guest memory"],
        ["guest", "wrote", "all"],
        ["host", "wanted half:", "allocated"],
        ["", "resi-", "dent"],
        ["", "", "swapped"],
        ["refaults,", "working", "set"],
        ["", "reading", "all"],
        ["free 2M", "blocks,", "created"],
        ["most", "given", "back"],
        ["", "com-", "pacted"],
        ["", "pages", "migrated"],
        ["own", "data", "right"],
    ];
    let cells = |course: &Course| -> Option<Vec<String>> {
        let at = |step| course.last(step);
        let (reclaimed, read) = (at(Step::Reclaimed)?, at(Step::Read)?);
        let (punched, compacted) = (at(Step::Punched)?, at(Step::Compacted)?);
        Some(vec![
            course.name.clone(),
            mib(at(Step::Written)?.resident as i64),
            reclaimed.allocated.map_or("-".into(), |bytes| mib(bytes as i64)),
            mib(reclaimed.resident as i64),
            mib(reclaimed.swapped as i64),
            reclaimed.refaults.to_string(),
            (read.refaults - reclaimed.refaults).to_string(),
            at(Step::Created)?.free_2m_blocks.to_string(),
            punched.free_2m_blocks.to_string(),
            compacted.free_2m_blocks.to_string(),
            (compacted.migrated - punched.migrated).to_string(),
            yes(course.own_data).into(),
        ])
    };
    let mut notes = absent(&story.missing);
    let rounds = story.courses.first().map_or(0, |course| {
        course.samples.iter().filter(|sample| sample.step == Step::Reclaimed).count() as u64
    });
    let notes_of_story = [
        format!(
            "\nThe guest keeps using {} MiB while the host asks for {} MiB, a bite at a time; the first",
            story.working_set / MIB,
            story.wanted * rounds / MIB
        ),
        "bites find every page in use, for the guest has just written it. Then the guest reads"
            .into(),
        format!(
            "everything, gives {} of {} pages back, and after the compaction it checks what it kept",
            story.keep - 1,
            story.keep
        ),
        "and writes the rest. Refaults and migrated count pages, migrated also those of others."
            .into(),
        "From memory.stat, memory.swap.current, st_blocks or smaps, vmstat and buddyinfo; the"
            .into(),
        "kernel does not say what a guest_memfd has allocated.".into(),
    ];
    if !story.courses.is_empty() {
        notes.extend(notes_of_story);
    }
    Table {
        title: format!("The same guest of {} MiB under pressure; MiB.", story.size / MIB),
        heads: &HEADS,
        words: &[0],
        rows: story.courses.iter().filter_map(cells).collect(),
        notes,
    }
}

/// The figures of real guests' memory.
pub fn real(real: &Real) -> Table {
    const HEADS: [[&str; 3]; 12] = [
        ["", "", "guest memory"],
        ["", "QEMU", "is up"],
        ["", "guest", "booted"],
        ["", "guest", "worked"],
        ["", "given", "back"],
        ["host", "wanted half:", "resident"],
        ["", "", "swapped"],
        ["then", "compacted:", "resident"],
        ["", "", "of it moved"],
        ["", "most", "allocated"],
        ["", "VM is", "gone"],
        ["own", "data", "right"],
    ];
    let cells = |course: &Course| -> Option<Vec<String>> {
        let at = |step| course.last(step);
        let resident = |step| Some(mib(at(step)?.resident as i64));
        let (reclaimed, compacted) = (at(Step::Reclaimed)?, at(Step::Compacted)?);
        let moved = reclaimed.memfile.zip(compacted.memfile);
        let allocated = course.samples.iter().filter_map(|sample| sample.allocated).max();
        Some(vec![
            course.name.clone(),
            resident(Step::Created)?,
            resident(Step::Booted)?,
            resident(Step::Worked)?,
            resident(Step::Freed)?,
            mib(reclaimed.resident as i64),
            mib(reclaimed.swapped as i64),
            mib(compacted.resident as i64),
            moved.map_or("-".into(), |(before, after)| (after[0] - before[0]).to_string()),
            allocated.map_or("-".into(), |bytes| mib(bytes as i64)),
            resident(Step::Gone)?,
            yes(course.own_data).into(),
        ])
    };
    let mut notes = absent(&real.story.missing);
    if !real.story.courses.is_empty() {
        notes.push(
            "\nMemory of QEMU in the host, as its cgroup has it: the guest's DIMM, what it has besides\n\
             of ordinary memory, and QEMU itself. Moved: pages of memfiles. Allocated: of the private\n\
             memory only, in memory or in swap. The guest checks all its data on the way."
                .into(),
        );
    }
    Table {
        title: format!(
            "Linux {} in QEMU, {} MiB; MiB. The host: Linux {}, a machine of {} MiB.",
            real.guest,
            real.story.size / MIB,
            real.kernel,
            real.machine / MIB
        ),
        heads: &HEADS,
        words: &[0],
        rows: real.story.courses.iter().filter_map(cells).collect(),
        notes,
    }
}

/// The table of real guests.
pub fn real_text(report: &Real) -> String {
    real(report).text()
}

fn absent(missing: &[Missing]) -> Vec<String> {
    missing.iter().map(|m| format!("{}: not shown, {}", m.name, m.reason)).collect()
}

impl Table {
    /// Aligned, with title and notes.
    fn text(&self) -> String {
        let width = |column: usize| {
            let head = self.heads[column].iter().map(|h| h.len());
            head.chain(self.rows.iter().map(|r| r[column].len())).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.heads.len()).map(width).collect();
        let line = |cell: &dyn Fn(usize) -> String| {
            let mut line = String::new();
            for (column, &width) in widths.iter().enumerate() {
                let (cell, gap) = (cell(column), if column == 0 { "" } else { "  " });
                let _ = match self.words.contains(&column) {
                    true => write!(line, "{gap}{cell:<width$}"),
                    false => write!(line, "{gap}{cell:>width$}"),
                };
            }
            line.trim_end().to_owned() + "\n"
        };
        let mut out = format!("{}\n\n", self.title);
        for level in [0, 1, 2] {
            out += &line(&|column| self.heads[column][level].into());
        }
        out += &line(&|column| "-".repeat(widths[column]));
        for row in &self.rows {
            out += &line(&|column| row[column].clone());
        }
        for note in &self.notes {
            out += &format!("{note}\n");
        }
        out
    }

    /// The same for a browser.
    pub fn html(&self) -> String {
        let row = |tag: &str, cells: Vec<String>| {
            let cells = cells.iter().enumerate().map(|(column, cell)| {
                let class = if self.words.contains(&column) { " class=word" } else { "" };
                format!("<{tag}{class}>{}</{tag}>", escaped(cell))
            });
            format!("<tr>{}</tr>\n", cells.collect::<String>())
        };
        // Joins a word that is broken between the lines of a head.
        let join = |head: &[&str; 3]| head.join(" ").trim().replace("- ", "");
        let mut out = format!("<table>\n<caption>{}</caption>\n", escaped(&self.title));
        out += &row("th", self.heads.iter().map(join).collect());
        out.extend(self.rows.iter().map(|cells| row("td", cells.clone())));
        out + &format!("</table>\n<p class=notes>{}</p>\n", escaped(&self.notes.join("\n")))
    }
}

/// Text as HTML.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Both tables.
pub fn text(report: &Report) -> String {
    format!("{}\n\n{}", costs(report).text(), pressure(&report.story).text())
}

/// A field of a CSV line.
fn field(text: &str) -> String {
    if text.contains([',', '"', '\n']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

/// A field that may have no figure.
fn known(figure: Option<impl ToString>) -> String {
    figure.map_or(String::new(), |figure| figure.to_string())
}

/// All figures in bytes, one line per row.
pub fn csv(report: &Report) -> String {
    let steps = ["creation", "write", "punch", "touch_again", "end"];
    let mut head = vec!["memory".to_owned(), "size".into(), "touched".into(), "source".into()];
    for step in steps {
        head.push(format!("after_{step}_by_object"));
        head.push(format!("after_{step}_by_machine"));
    }
    head.extend(
        [
            "hole_reads_zeros",
            "own_data_elsewhere",
            "kernel_reads_it",
            "kvm_pages_4k",
            "kvm_pages_2m",
            "kvm_pages_1g",
        ]
        .map(str::to_owned),
    );
    let mut out = head.join(",") + "\n";
    for row in &report.rows {
        let mut line = vec![field(&row.name), row.size.to_string(), row.touched.to_string()];
        line.push(row.source.clone());
        let figures = [Some(row.after_creation), Some(row.after_write), row.after_punch];
        for figure in figures.into_iter().chain([row.after_touch_again, Some(row.after_end)]) {
            line.push(known(figure.and_then(|figure| figure.by_object)));
            line.push(known(figure.map(|figure| figure.by_machine)));
        }
        line.push(known(row.hole_reads_zeros));
        line.push(row.own_data_elsewhere.to_string());
        line.push(known(row.kernel_reads_it));
        line.push(row.kvm_pages_4k.to_string());
        line.push(row.kvm_pages_2m.to_string());
        line.push(row.kvm_pages_1g.to_string());
        out += &(line.join(",") + "\n");
    }
    out
}

/// One line per course and step; bytes, pages and blocks as in [`super::story::Sample`].
pub fn story_csv(story: &Story) -> String {
    let mut out = "memory,step,allocated,resident,swapped,refaults,migrated,free_2m_blocks,\
                   memfile_migrate,memfile_swap_out,memfile_young\n"
        .to_owned();
    for course in &story.courses {
        for sample in &course.samples {
            let mut line = vec![field(&course.name), sample.step.name().into()];
            line.push(sample.allocated.map_or(String::new(), |bytes| bytes.to_string()));
            let figures = [sample.resident, sample.swapped, sample.refaults, sample.migrated];
            line.extend(figures.map(|figure| figure.to_string()));
            line.push(sample.free_2m_blocks.to_string());
            line.extend(
                [0, 1, 2].map(|n| sample.memfile.map_or(String::new(), |m| m[n].to_string())),
            );
            out += &(line.join(",") + "\n");
        }
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::super::story::Sample;
    use super::*;

    pub fn report() -> Report {
        let figure = |bytes: u64| Figure { by_object: Some(bytes), by_machine: bytes as i64 + 5 };
        let row = Row {
            name: "a, b".into(),
            size: 256 * MIB,
            touched: 64 * MIB,
            source: "st_blocks".into(),
            after_creation: figure(0),
            after_write: figure(64 * MIB),
            after_punch: Some(figure(32 * MIB)),
            after_touch_again: None,
            after_end: Figure { by_object: None, by_machine: -100 },
            hole_reads_zeros: Some(true),
            own_data_elsewhere: false,
            kernel_reads_it: Some(true),
            kvm_pages_4k: 3,
            kvm_pages_2m: 0,
            kvm_pages_1g: 0,
        };
        let missing = vec![Missing { name: "c".into(), reason: "no c here".into() }];
        Report { kernel: "7.3".into(), machine: MIB, rows: vec![row], missing, story: story() }
    }

    fn story() -> Story {
        let sample = |step| Sample {
            step,
            allocated: None,
            resident: MIB,
            swapped: 0,
            refaults: 7,
            migrated: 8,
            free_2m_blocks: 900,
            memfile: Some([1, 2, 3]),
        };
        let steps = [Step::Created, Step::Written, Step::Reclaimed, Step::Read, Step::Punched];
        let steps = steps.into_iter().chain([Step::Compacted, Step::Rewritten, Step::Gone]);
        let course =
            Course { name: "d, <e>".into(), samples: steps.map(sample).collect(), own_data: false };
        Story {
            size: 64 * MIB,
            working_set: 16 * MIB,
            wanted: 8 * MIB,
            keep: 16,
            courses: vec![course],
            missing: vec![],
        }
    }

    /// The results of real guests, as `make demo-guest` leaves them in `guest.json`: a course that
    /// went to its end, one on memory that the host cannot move, one that ended early, and a kind
    /// that this machine does not have.
    pub fn real_guests() -> Real {
        let sample =
            |step: &str, allocated: Option<u64>, resident: u64, swapped: u64, moved: u64| {
                json!({
                    "step": step, "allocated": allocated.map(|mib| mib * MIB),
                    "resident": resident * MIB, "swapped": swapped * MIB, "refaults": 1,
                    "migrated": 2, "free_2m_blocks": 3,
                    "memfile": allocated.map(|_| [moved, 4, 5])
                })
            };
        let steps = ["created", "booted", "worked", "freed", "reclaimed", "compacted", "gone"];
        let whole: Vec<_> = [
            sample(steps[0], Some(11), 21, 0, 100),
            sample(steps[1], Some(12), 22, 0, 100),
            sample(steps[2], Some(19), 23, 0, 100),
            sample(steps[3], Some(13), 24, 0, 100),
            sample(steps[4], Some(14), 25, 35, 100),
            sample(steps[5], Some(15), 26, 36, 142),
            sample(steps[6], None, 27, 0, 100),
        ]
        .into();
        let plain: Vec<_> = steps.map(|step| sample(step, None, 41, 0, 0)).into();
        let value = json!({
            "kernel": "7.3.4", "machine": 2048 * MIB, "guest": "6.12 <stock>",
            "story": {
                "size": 512 * MIB, "working_set": 0, "wanted": 0, "keep": 4,
                "courses": [
                    { "name": "private, <both>", "samples": whole, "own_data": true },
                    { "name": "shared memfd", "samples": plain, "own_data": false },
                    { "name": "ended early", "samples": plain[..3], "own_data": true }
                ],
                "missing": [{ "name": "private, huge pages", "reason": "no pool & none to be had" }]
            }
        });
        serde_json::from_value(value).expect("the form of guest.json")
    }

    #[test]
    fn table_of_real_guests_has_each_figure_in_its_column() {
        let report = real_guests();
        assert!(!report.is_right());
        let text = real_text(&report);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[0],
            "Linux 6.12 <stock> in QEMU, 512 MiB; MiB. The host: Linux 7.3.4, a machine of 2048 MiB."
        );
        let row = |name: &str| {
            let mut rows = lines.iter().filter_map(|line| line.strip_prefix(name));
            let words = rows.next().map(|row| row.split_whitespace().collect::<Vec<_>>());
            assert_eq!(rows.next(), None, "{text}");
            words
        };
        // QEMU is up, booted, worked, given back, resident, swapped, compacted, moved, most, gone,
        // data.
        let whole = ["21", "22", "23", "24", "25", "35", "26", "42", "19", "27", "yes"];
        assert_eq!(row("private, <both>"), Some(whole.to_vec()));
        let plain = ["41", "41", "41", "41", "41", "0", "41", "-", "-", "41", "NO"];
        assert_eq!(row("shared memfd"), Some(plain.to_vec()));
        assert_eq!(row("ended early"), None);
        assert!(
            lines.contains(&"private, huge pages: not shown, no pool & none to be had"),
            "{text}"
        );
        assert!(lines.iter().all(|line| line.len() <= 120), "{text}");
        // A column is as wide as its widest cell, and the heads stand over the figures.
        let end = |line: &str, word: &str| line.find(word).map(|at| at + word.len());
        assert_eq!(end(lines[4], "moved"), end(lines[6], " 42"), "{text}");
    }

    #[test]
    fn mib_rounds_to_tenths() {
        let m = MIB as i64;
        assert_eq!(
            [0, m, m / 2, -m, -100, 3 * m / 10].map(mib),
            ["0", "1", "0.5", "-1", "0", "0.3"]
        );
    }

    #[test]
    fn csv_has_one_field_per_head() {
        let text = csv(&report());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[1].starts_with("\"a, b\",268435456,67108864,st_blocks,0,5,"));
        // The quoted name holds one comma more.
        assert_eq!(lines[0].matches(',').count() + 1, lines[1].matches(',').count());
    }

    #[test]
    fn story_csv_has_one_field_per_head() {
        let text = story_csv(&story());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 9);
        assert_eq!(lines[1], "\"d, <e>\",created,,1048576,0,7,8,900,1,2,3");
        assert_eq!(lines[0].matches(',').count() + 1, lines[1].matches(',').count());
    }

    #[test]
    fn html_is_escaped() {
        let html = pressure(&story()).html();
        assert!(html.contains("<td class=word>d, &lt;e&gt;</td>"), "{html}");
        assert!(html.contains("<th>resident</th>"), "{html}");
    }

    #[test]
    fn table_is_aligned_and_complete() {
        let text = text(&report());
        assert!(text.contains("a, b"), "{text}");
        assert!(text.contains(" NO  "), "{text}");
        assert!(text.contains("c: not shown, no c here"), "{text}");
        assert!(text.lines().all(|l| l.len() <= 120), "{text}");
    }
}
