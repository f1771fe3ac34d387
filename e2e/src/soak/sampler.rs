//! Samples of memory and descriptors of all agents' processes, once per second. A process that
//! replaces another continues its series.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use skein_lab::Lab;
use skein_lab::process::resident_bytes;

const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Role of a process on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Agent,
    Keeper,
    Data,
}

/// Resources of a process at one time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// Time since the start of the sampler.
    pub(super) at: Duration,
    /// Resident memory, bytes.
    pub(super) resident: u64,
    /// Number of open descriptors.
    pub(super) descriptors: usize,
}

/// Samples by name of the node and role, in the order of time.
pub(super) type Samples = BTreeMap<(String, Role), Vec<Sample>>;

pub(super) struct Sampler<'scope> {
    stop: Arc<AtomicBool>,
    thread: thread::ScopedJoinHandle<'scope, Samples>,
}

impl<'scope> Sampler<'scope> {
    pub(super) fn start<'env>(scope: &'scope Scope<'scope, 'env>, lab: &'env Lab) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = scope.spawn(move || {
            let (start, mut samples) = (Instant::now(), Samples::new());
            while !flag.load(Ordering::Relaxed) {
                for node in &lab.nodes {
                    for (role, pid) in roles(&node.ns.pids()) {
                        let at = start.elapsed();
                        // A process that has just exited has no resources.
                        if let Some(sample) = sample(pid, at) {
                            samples.entry((node.name.clone(), role)).or_default().push(sample);
                        }
                    }
                }
                thread::sleep(SAMPLE_INTERVAL);
            }
            samples
        });
        Self { stop, thread }
    }

    pub(super) fn stop(self) -> Samples {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

/// Returns the agents' processes among these. `skein-agent hold`, which runs after a take-over, is
/// not one of them.
fn roles(pids: &[i32]) -> Vec<(Role, i32)> {
    let role = |&pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut words = line.split(|&byte| byte == 0);
        if !words.next()?.ends_with(b"skein-agent") {
            return None;
        }
        let role = match words.next()? {
            b"run" => Role::Agent,
            b"dataplane" if words.any(|word| word == b"--worker") => Role::Data,
            b"dataplane" => Role::Keeper,
            _ => return None,
        };
        Some((role, pid))
    };
    pids.iter().filter_map(role).collect()
}

fn sample(pid: i32, at: Duration) -> Option<Sample> {
    let resident = resident_bytes(pid).ok()?;
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    Some(Sample { at, resident, descriptors })
}
