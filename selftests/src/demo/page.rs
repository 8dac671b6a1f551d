// SPDX-License-Identifier: GPL-2.0
//! The report as one HTML page that needs nothing else.

use anyhow::Result;

use super::{Real, Report, plot, table};

const STYLE: &str = "
body { font: 15px/1.45 sans-serif; max-width: 88em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1.5em 0 0.5em; }
caption { text-align: left; font-weight: bold; padding-bottom: 0.5em; }
th, td { padding: 0.25em 0.7em; text-align: right; vertical-align: bottom; }
th { border-bottom: 2px solid; max-width: 8em; }
td { border-bottom: 1px solid #ccc; font-variant-numeric: tabular-nums; }
.word { text-align: left; white-space: nowrap; }
svg { max-width: 100%; height: auto; }
p { max-width: 60em; white-space: pre-line; color: #444; }
";

/// Tables and plot.
pub fn html(report: &Report) -> Result<String> {
    let costs = table::costs(report).html();
    let pressure = table::pressure(&report.story).html();
    let plot = plot::svg(&report.story, "A guest under pressure")?;
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=en>\n<meta charset=utf-8>\n<title>memfile</title>\n\
         <style>{STYLE}</style>\n<h1>Who pays for guest memory, and when</h1>\n\
         {costs}<h2>Under pressure</h2>\n{pressure}{plot}\n</html>\n"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_has_everything_and_needs_nothing_else() {
        let html = html(&table::tests::report()).unwrap();
        for part in ["a, b", "d, &lt;e&gt;", "<svg ", "free blocks of 2 MiB", "given back"] {
            assert!(html.contains(part), "{part} is not in {html}");
        }
        for link in ["src=", "href=", "@import", "url("] {
            assert!(!html.contains(link), "{link} is in {html}");
        }
    }
}
