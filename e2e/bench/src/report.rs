//! Output of results: JSON, Markdown tables and plots.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::measure::Values;
use super::overlay::{Overlay, Variant};
use super::workloads::Workload;
use super::{Mode, Results, plot};
use skein_lab::load::median;

const SKEIN: Overlay = Overlay::Skein(Variant::Full);

/// Writes results.json, results.md and the plots to `directory`, and returns the Markdown text.
///
/// # Errors
/// If the directory or a file cannot be written.
pub fn write(results: &Results, directory: &Path) -> Result<String> {
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let json = serde_json::to_vec_pretty(results)?;
    fs::write(directory.join("results.json"), json)?;
    let mut markdown = head(results);
    for mode in modes(results) {
        let table = Table::of(results, mode);
        markdown += &table.markdown();
        let svg = plot::svg(&table);
        let name = format!("{mode:?}.svg").to_lowercase();
        fs::write(directory.join(name), svg)?;
    }
    for note in &results.notes {
        let _ = writeln!(markdown, "- {note}");
    }
    fs::write(directory.join("results.md"), &markdown)?;
    Ok(markdown)
}

fn head(results: &Results) -> String {
    let machine = &results.machine;
    let rounds = results.samples.iter().map(|s| s.round).max().unwrap_or(0);
    let mut text = format!(
        "# Benchmark\n\n{} CPUs ({}), Linux {}, load {:.2} before the start. Traffic between pods on \
         one host. Clients, servers and daemons share its CPUs. Medians over rounds ({rounds}) of {} \
         s.\n",
        machine.cpus, machine.processor, machine.kernel, machine.load, results.seconds
    );
    for (overlay, version) in &machine.versions {
        let _ = writeln!(text, "- {overlay}: {version}");
    }
    text.push('\n');
    text
}

fn modes(results: &Results) -> Vec<Mode> {
    let mut modes: Vec<Mode> = results.samples.iter().map(|s| s.mode).collect();
    modes.sort();
    modes.dedup();
    modes
}

/// Function that returns one quantity of a result.
type Quantity<'a> = &'a dyn Fn(&Values) -> Option<f64>;

/// Medians of all results over one underlay.
pub struct Table {
    /// Underlay of the results.
    pub mode: Mode,
    /// Networks in the order of the columns.
    pub overlays: Vec<Overlay>,
    /// Rows by workload, then by quantity.
    pub rows: Vec<Row>,
}

/// Medians of one quantity of one workload.
pub struct Row {
    /// Workload of the row.
    pub workload: Workload,
    /// Name of the quantity.
    pub quantity: &'static str,
    /// Unit of the quantity; empty for a number.
    pub unit: &'static str,
    /// Median of each network, in the order of the columns; `None` without a value.
    pub medians: Vec<Option<f64>>,
}

impl Table {
    fn of(results: &Results, mode: Mode) -> Self {
        let mut overlays: Vec<Overlay> = vec![];
        let mut workloads: Vec<Workload> = vec![];
        for sample in results.samples.iter().filter(|s| s.mode == mode) {
            if !overlays.contains(&sample.overlay) {
                overlays.push(sample.overlay);
            }
            if !workloads.contains(&sample.workload) {
                workloads.push(sample.workload);
            }
        }
        workloads.sort();
        let mut rows = vec![];
        for &workload in &workloads {
            let (rate, rate_factor, cpu, cpu_factor) = workload.units();
            let quantities: [(&str, &str, Quantity<'_>); 8] = [
                ("throughput", rate, &|v| Some(v.rate * rate_factor)),
                ("daemon CPU", cpu, &|v| Some(v.daemon_cpu * cpu_factor)),
                ("total CPU", cpu, &|v| Some(v.total_cpu * cpu_factor)),
                ("p50", "µs", &|v| v.p50),
                ("p99", "µs", &|v| v.p99),
                ("retransmits", "", &|v| v.retransmits),
                ("lost", "%", &|v| v.lost.map(|share| share * 100.0)),
                ("busiest lane", "%", &|v| v.busiest_lane.map(|share| share * 100.0)),
            ];
            for (quantity, unit, value) in quantities {
                let of = |overlay: &Overlay| {
                    let samples = results.samples.iter().filter(|s| {
                        s.mode == mode && s.overlay == *overlay && s.workload == workload
                    });
                    median(samples.filter_map(|s| value(&s.values)))
                };
                let medians: Vec<_> = overlays.iter().map(of).collect();
                if medians.iter().any(Option::is_some) {
                    rows.push(Row { workload, quantity, unit, medians });
                }
            }
        }
        Self { mode, overlays, rows }
    }

    fn column(&self, overlay: Overlay) -> Option<usize> {
        self.overlays.iter().position(|o| *o == overlay)
    }

    fn markdown(&self) -> String {
        let what = match self.mode {
            Mode::Ideal => "ideal: veth with all offloads",
            Mode::Wire => "wire: no segmentation offload on the underlay, GRO on",
            Mode::Jumbo => "jumbo: MTU 9000 and all offloads, usual MTU of pods",
        };
        let mut text = format!("## Underlay {what}\n\n| workload | quantity | unit |");
        let mut rule = "|---|---|---|".to_owned();
        // Columns with the ratio of Skein to every other network.
        let skein = self.column(SKEIN);
        let against: Vec<(Overlay, usize)> = self
            .overlays
            .iter()
            .enumerate()
            .filter(|(_, overlay)| skein.is_some() && **overlay != SKEIN)
            .map(|(column, overlay)| (*overlay, column))
            .collect();
        for overlay in &self.overlays {
            let _ = write!(text, " {overlay} |");
            rule += "---:|";
        }
        for (overlay, _) in &against {
            let _ = write!(text, " skein / {overlay} |");
            rule += "---:|";
        }
        let _ = writeln!(text, "\n{rule}");
        let mut last = None;
        for row in &self.rows {
            let title = if last == Some(row.workload) { "" } else { row.workload.title() };
            last = Some(row.workload);
            let _ = write!(text, "| {title} | {} | {} |", row.quantity, row.unit);
            for median in &row.medians {
                let _ = write!(text, " {} |", median.map_or("–".into(), number));
            }
            for (_, column) in &against {
                let ratio = || Some((row.medians[skein?]?, row.medians[*column]?));
                let ratio = ratio().filter(|(_, other)| *other > 0.0);
                let ratio =
                    ratio.map_or("–".into(), |(own, other)| format!("{:.2}", own / other));
                let _ = write!(text, " {ratio} |");
            }
            text.push('\n');
        }
        text.push('\n');
        text
    }
}

/// Formats a value with about three significant digits.
pub fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        v if v < 1.0 => format!("{value:.3}"),
        v if v < 10.0 => format!("{value:.2}"),
        v if v < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}
