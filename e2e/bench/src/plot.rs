//! Bar charts as SVG, one for each quantity of each workload.

use std::fmt::Write as _;

use super::report::{Row, Table, number};

const COLUMNS: usize = 3;
const CHART_WIDTH: f64 = 340.0;
const LABEL_WIDTH: f64 = 110.0;
const BAR: f64 = 18.0;
const TITLE: f64 = 34.0;
const GAP: f64 = 24.0;
const COLOURS: [&str; 8] =
    ["#8a8f98", "#4e79a7", "#d1495b", "#59a14f", "#f28e2b", "#b07aa1", "#76b7b2", "#9c755f"];

/// Returns the rows of the quantities that the picture shows.
fn charts(table: &Table) -> Vec<&Row> {
    let shown = ["throughput", "daemon CPU", "p50", "p99"];
    table.rows.iter().filter(|row| shown.contains(&row.quantity)).collect()
}

/// Draws the charts of a table and returns the SVG document.
pub fn svg(table: &Table) -> String {
    let charts = charts(table);
    let height = TITLE + BAR * table.overlays.len() as f64 + GAP;
    let rows = charts.len().div_ceil(COLUMNS);
    let total = (COLUMNS as f64 * (CHART_WIDTH + GAP), rows as f64 * height + 50.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {:.0} {:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"28\" font-size=\"18\">Pod to pod, underlay {}</text>\n",
        total.0,
        total.1,
        format!("{:?}", table.mode).to_lowercase()
    );
    for (i, row) in charts.iter().enumerate() {
        let x = 12.0 + (i % COLUMNS) as f64 * (CHART_WIDTH + GAP);
        let y = 50.0 + (i / COLUMNS) as f64 * height;
        let _ = writeln!(svg, "<g transform=\"translate({x:.0},{y:.0})\">");
        chart(&mut svg, table, row);
        svg += "</g>\n";
    }
    svg + "</svg>\n"
}

fn chart(svg: &mut String, table: &Table, row: &Row) {
    let better = if row.quantity == "throughput" { "higher is better" } else { "lower is better" };
    let _ = writeln!(
        svg,
        "<text y=\"14\" font-weight=\"bold\">{}: {}</text>\n\
         <text y=\"28\" fill=\"#666\" font-size=\"10\">{}, {better}</text>",
        row.workload, row.quantity, row.unit
    );
    let largest = row.medians.iter().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
    let room = CHART_WIDTH - LABEL_WIDTH - 50.0;
    for (i, (overlay, median)) in table.overlays.iter().zip(&row.medians).enumerate() {
        let y = TITLE + i as f64 * BAR;
        let text_y = y + BAR * 0.7;
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"{text_y:.1}\" text-anchor=\"end\">{overlay}</text>",
            LABEL_WIDTH - 6.0
        );
        let width = median.unwrap_or(0.0) / largest * room;
        let colour = COLOURS[i % COLOURS.len()];
        let value = median.map_or("–".into(), number);
        let _ = writeln!(
            svg,
            "<rect x=\"{LABEL_WIDTH}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" \
             fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{text_y:.1}\">{value}</text>",
            BAR - 3.0,
            LABEL_WIDTH + width + 4.0
        );
    }
}
