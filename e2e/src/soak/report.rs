//! Report of a run: tables, and the problems that make the run fail.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;

use super::Event;
use super::faults::Fault;
use super::flows::{FlowKind, FlowStats};
use super::sampler::{Sample, Samples};

/// Maximum growth of a process's median memory from the second sixth to the last sixth of the run,
/// bytes.
/// A process that was started a minute ago has touched less of its buffers than an older one.
const MEMORY_BOUND: u64 = 3 << 20;

/// Maximum growth of a process's median number of descriptors over the same time.
const DESCRIPTOR_BOUND: usize = 4;

pub(super) struct Report {
    tables: Vec<Table>,
    /// Messages about problems; the run failed unless this is empty.
    pub(super) problems: Vec<String>,
}

impl Report {
    pub(super) fn of(
        events: Vec<Event>,
        flows: &[(FlowKind, Arc<FlowStats>)],
        samples: &Samples,
        duration: Duration,
        mut problems: Vec<String>,
    ) -> Self {
        let traffic = traffic(flows, &mut problems);
        let growth = growth(samples, duration, &mut problems);
        Self { tables: vec![traffic, faults(events), growth], problems }
    }
}

fn traffic(flows: &[(FlowKind, Arc<FlowStats>)], problems: &mut Vec<String>) -> Table {
    let mut table = table(&["flow", "MiB", "compared", "wrong", "lost", "failures"]);
    let load = Ordering::Relaxed;
    let mut total = 0;
    for (flow, stats) in flows {
        let (bytes, done) = (stats.progress.bytes(), stats.done.load(load));
        let (wrong, failures) = (stats.wrong.load(load), stats.failures());
        let kind = match flow {
            FlowKind::Bulk => "connections",
            FlowKind::Files => "files",
            FlowKind::Datagrams(..) => "datagrams",
            FlowKind::Requests => "responses",
        };
        total += bytes;
        table.add_row([
            stats.name.clone(),
            (bytes >> 20).to_string(),
            format!("{done} {kind}"),
            wrong.to_string(),
            stats.lost.load(load).to_string(),
            failures.len().to_string(),
        ]);
        if wrong > 0 {
            problems.push(format!("{}: {wrong} {kind} with wrong bytes", stats.name));
        }
        if bytes == 0 {
            problems.push(format!("{}: no byte was received", stats.name));
        }
        problems.extend(failures);
    }
    table.add_row(["all", &(total >> 20).to_string()]);
    table
}

fn faults(events: Vec<Event>) -> Table {
    let mut by_fault: BTreeMap<Fault, Vec<Duration>> = BTreeMap::new();
    for event in events {
        by_fault.entry(event.fault).or_default().push(event.stall);
    }
    let mut table = table(&["fault", "count", "interruption: median ms", "maximum ms"]);
    for (fault, mut stalls) in by_fault {
        stalls.sort_unstable();
        let ms = |stall: Option<&Duration>| stall.map_or(0, Duration::as_millis).to_string();
        table.add_row([
            fault.to_string(),
            stalls.len().to_string(),
            ms(stalls.get(stalls.len() / 2)),
            ms(stalls.last()),
        ]);
    }
    table
}

fn growth(samples: &Samples, duration: Duration, problems: &mut Vec<String>) -> Table {
    let header = ["process", "samples", "MiB: second sixth", "last sixth", "most"];
    let more = ["descriptors: second sixth", "last sixth", "most"];
    let mut table = table(&[&header[..], &more].concat());
    let sixth = duration / 6;
    for ((node, role), all) in samples {
        let part = |number: u32| {
            let of = |sample: &&Sample| (sixth * number..sixth * (number + 1)).contains(&sample.at);
            all.iter().filter(of).copied().collect::<Vec<_>>()
        };
        let name = format!("{node} {role:?}");
        let (early, late) = (part(1), part(5));
        let memory = [&early, &late].map(|part| median(part.iter().map(|s| s.resident)));
        let descriptors = [&early, &late].map(|part| median(part.iter().map(|s| s.descriptors)));
        let ([Some(m0), Some(m1)], [Some(d0), Some(d1)]) = (memory, descriptors) else {
            problems.push(format!("{name}: too few samples ({})", all.len()));
            continue;
        };
        let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
        table.add_row([
            name.clone(),
            all.len().to_string(),
            mib(m0),
            mib(m1),
            mib(all.iter().map(|sample| sample.resident).max().unwrap_or_default()),
            d0.to_string(),
            d1.to_string(),
            all.iter().map(|sample| sample.descriptors).max().unwrap_or_default().to_string(),
        ]);
        if m1 > m0 + MEMORY_BOUND {
            problems.push(format!("the memory of {name} grew from {} to {} MiB", mib(m0), mib(m1)));
        }
        if d1 > d0 + DESCRIPTOR_BOUND {
            problems.push(format!("the descriptors of {name} grew from {d0} to {d1}"));
        }
    }
    table
}

fn median<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut all: Vec<T> = values.collect();
    all.sort_unstable();
    all.get(all.len() / 2).copied()
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_BORDERS_ONLY).set_header(header);
    table
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for table in &self.tables {
            writeln!(f, "{table}")?;
        }
        writeln!(
            f,
            "Maximum growth from the second sixth to the last sixth of the run (medians): {} MiB \
             and {DESCRIPTOR_BOUND} descriptors.",
            MEMORY_BOUND >> 20
        )?;
        self.problems.iter().try_for_each(|problem| writeln!(f, "PROBLEM {problem}"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::soak::sampler::Role;

    fn grown(by: u64, descriptors: usize) -> Vec<String> {
        let sample = |second: u64| Sample {
            at: Duration::from_secs(second),
            resident: (20 << 20) + by * second / 60,
            descriptors: 10 + descriptors * second as usize / 60,
        };
        let samples = Samples::from([(
            ("node-a".to_owned(), Role::Data),
            (0..60).map(sample).collect::<Vec<_>>(),
        )]);
        let mut problems = vec![];
        growth(&samples, Duration::from_secs(60), &mut problems);
        problems
    }

    #[test]
    fn growth_beyond_the_bounds_is_a_problem() {
        assert_eq!(grown(0, 0), [""; 0]);
        assert_eq!(grown(3 << 20, 3), [""; 0]);
        let memory = grown(30 << 20, 0);
        assert!(memory[0].starts_with("the memory of node-a Data grew from 27.5 to"), "{memory:?}");
        let descriptors = grown(0, 30);
        assert!(
            descriptors[0].starts_with("the descriptors of node-a Data grew"),
            "{descriptors:?}"
        );
        let mut problems = vec![];
        let one = Sample { at: Duration::ZERO, resident: 1, descriptors: 1 };
        let samples = Samples::from([(("node-a".to_owned(), Role::Keeper), vec![one])]);
        growth(&samples, Duration::from_secs(60), &mut problems);
        assert_eq!(problems, ["node-a Keeper: too few samples (1)"]);
    }
}
