// SPDX-License-Identifier: GPL-2.0
//! The story as a picture: one cell per kind of memory, over the steps of the story.

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::story::{Course, Sample, Story};
use crate::MIB;

/// Cells beside each other.
const COLUMNS: usize = 3;
/// Pixels of a cell.
const CELL: (u32, u32) = (460, 430);
/// Pixels of the part of a cell that shows memory; the rest shows free blocks.
const MEMORY: i32 = 230;
/// Pixels of title and legend.
const TOP: u32 = 70;

/// A line of the picture.
struct Line {
    label: &'static str,
    colour: RGBColor,
    width: u32,
    /// None where the kernel has no figure.
    value: fn(&Sample) -> Option<f64>,
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

/// The wide lines first, so that lines that coincide with them show on top.
const LINES: [Line; 3] = [
    Line {
        label: "allocated, in memory or in swap",
        colour: RGBColor(0xbb, 0xbb, 0xbb),
        width: 7,
        value: |sample| sample.allocated.map(mib),
    },
    Line {
        label: "resident",
        colour: RGBColor(0x00, 0x55, 0xaa),
        width: 2,
        value: |sample| Some(mib(sample.resident)),
    },
    Line {
        label: "swapped",
        colour: RGBColor(0xdd, 0x66, 0x00),
        width: 2,
        value: |sample| Some(mib(sample.swapped)),
    },
];

const BLOCKS: Line = Line {
    label: "free blocks of 2 MiB in the machine",
    colour: RGBColor(0x22, 0x88, 0x33),
    width: 2,
    value: |sample| Some(sample.free_2m_blocks as f64),
};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// An SVG of all courses, on the same scales.
pub fn svg(story: &Story, title: &str) -> Result<String> {
    let mut text = String::new();
    let rows = story.courses.len().div_ceil(COLUMNS).max(1);
    let size = (CELL.0 * COLUMNS as u32, TOP + CELL.1 * rows as u32);
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        draw(&area, story, title, rows).map_err(|e| anyhow!("{e}")).context("draw the story")?;
    }
    Ok(text)
}

fn draw(
    area: &Area,
    story: &Story,
    title: &str,
    rows: usize,
) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let (top, cells) = area.split_vertically(TOP);
    let title = format!("{title}, {} MiB", story.size / MIB);
    top.draw(&Text::new(title, (20, 12), ("sans-serif", 20)))?;
    let mut left = 20;
    for line in LINES.iter().chain([&BLOCKS]) {
        let (style, text) = (line.colour.stroke_width(line.width), left + 38);
        top.draw(&PathElement::new([(left, 52), (left + 30, 52)], style))?;
        let font = ("sans-serif", 14).into_text_style(&top);
        left += 38 + 28 + top.estimate_text_size(line.label, &font)?.0 as i32;
        top.draw(&Text::new(line.label, (text, 45), font))?;
    }

    let samples = || story.courses.iter().flat_map(|course| &course.samples);
    let values = |line: &Line| samples().filter_map(line.value).collect::<Vec<_>>();
    let highest = |line: &Line| values(line).into_iter().fold(0.0, f64::max);
    let memory = 0.0..LINES.iter().map(highest).fold(1.0, f64::max) * 1.08;
    let blocks = values(&BLOCKS);
    let least = blocks.iter().copied().fold(f64::INFINITY, f64::min).min(highest(&BLOCKS));
    // The axis does not begin at 0: the differences matter, not the size of the machine.
    let blocks = (least - 8.0).max(0.0)..highest(&BLOCKS) + 8.0;
    for (course, cell) in story.courses.iter().zip(cells.split_evenly((rows, COLUMNS))) {
        let (upper, lower) = cell.split_vertically(MEMORY);
        chart(&upper, course, &LINES, memory.clone(), "MiB", Some(&course.name))?;
        chart(&lower, course, &[BLOCKS], blocks.clone(), "blocks", None)?;
    }
    area.present()?;
    Ok(())
}

/// One diagram; it names the steps if it has no title of its own.
fn chart(
    area: &Area,
    course: &Course,
    lines: &[Line],
    scale: std::ops::Range<f64>,
    unit: &str,
    title: Option<&str>,
) -> Result<(), Box<dyn std::error::Error>> {
    let steps = course.samples.len() as i32;
    let bottom = scale.start;
    let mut builder = ChartBuilder::on(area);
    builder.margin_right(20).margin_left(8).set_label_area_size(LabelAreaPosition::Left, 52);
    match title {
        Some(title) => builder.caption(title, ("sans-serif", 17)),
        None => builder.set_label_area_size(LabelAreaPosition::Bottom, 84).margin_top(10),
    };
    let mut chart = builder.build_cartesian_2d(0..steps - 1, scale)?;
    let mut mesh = chart.configure_mesh();
    mesh.x_labels(steps as usize)
        .x_label_formatter(&|_| String::new())
        .y_desc(unit)
        .y_label_style(("sans-serif", 12))
        .y_labels(5)
        .y_label_formatter(&|value| format!("{value:.0}"))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for line in lines {
        let points = (0..).zip(&course.samples);
        let points: Vec<_> =
            points.filter_map(|(x, sample)| Some((x, (line.value)(sample)?))).collect();
        let style = line.colour.stroke_width(line.width);
        chart.draw_series(LineSeries::new(points.clone(), style))?;
        let dot = |point| Circle::new(point, 3, line.colour.filled());
        chart.draw_series(points.into_iter().map(dot))?;
    }
    if title.is_none() {
        // Labels of the mesh cannot be turned: they would be turned around their middle.
        let font = ("sans-serif", 12).into_font().transform(FontTransform::Rotate90);
        let style = font.into_text_style(area).pos(Pos::new(HPos::Left, VPos::Center));
        let (left, top) = area.get_base_pixel();
        for (x, sample) in (0..).zip(&course.samples) {
            let (x, y) = chart.backend_coord(&(x, bottom));
            let at = (x - left, y - top + 8);
            area.draw(&Text::new(sample.step.name(), at, style.clone()))?;
        }
    }
    Ok(())
}
