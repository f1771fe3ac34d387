//! The log: text or JSON lines on standard error, a level that can be changed while the process runs, and
//! a bound on how often one place of the code may speak.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::{Event, Metadata};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, Filter, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// Lines that one place of the code may write at once, …
const BURST: u32 = 50;
/// … and one more each time so long has passed.
const EVERY: Duration = Duration::from_millis(200);
/// How often is told what was left out.
const TELL: Duration = Duration::from_secs(10);

/// Logging to standard error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// A filter of `tracing`: `info`, or `skein_agent=debug,info`.
    pub level: String,
    /// Its form.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::default() }
    }
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// A line for people.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

impl LogFormat {
    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

static LOG: OnceLock<State> = OnceLock::new();

struct State {
    level: reload::Handle<EnvFilter, Registry>,
    /// What the process was started with.
    configured: String,
    bounds: Mutex<Bounds>,
    /// Tells what was left out; asleep while nothing is. Not started before it is needed: what a process
    /// gives up at its start it gives up for one thread.
    teller: OnceLock<Option<Thread>>,
}

/// Starts it. `SKEIN_LOG` overrides the level.
pub fn start(log: &Log) {
    let configured = std::env::var("SKEIN_LOG")
        .ok()
        .filter(|text| EnvFilter::try_new(with_crates(text)).is_ok());
    let configured = configured.unwrap_or_else(|| log.level.clone());
    let filter = EnvFilter::try_new(with_crates(&configured)).unwrap_or_default();
    let (filter, level) = reload::Layer::new(filter);
    // Whoever read standard error may be gone: that must not end the process, so a line that cannot
    // be written is lost in silence.
    let lines = fmt::layer().with_writer(io::stderr).log_internal_errors(false);
    let lines = match log.format {
        LogFormat::Text => {
            let colours = io::IsTerminal::is_terminal(&io::stderr());
            lines.with_ansi(colours).with_target(false).boxed()
        }
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let started =
        tracing_subscriber::registry().with(filter).with(lines.with_filter(Bound)).try_init();
    // Fails only where a log was started before, which then goes on.
    if started.is_ok() {
        // As above.
        let _ =
            LOG.set(State { level, configured, bounds: Mutex::default(), teller: OnceLock::new() });
    }
}

/// Sets what is logged from now on, as `log.level` does; `None`: what the process was started with.
pub fn set_level(level: Option<&str>) -> Result<(), String> {
    let log = LOG.get().ok_or("there is no log")?;
    let level = level.unwrap_or(&log.configured);
    let filter = parse(level)?;
    log.level.reload(filter).map_err(|error| error.to_string())?;
    tracing::info!(level, "the level of the log is set");
    Ok(())
}

/// Parses a level, or a filter such as `skein_agent=debug,info`.
///
/// # Errors
///
/// A sentence with the remedy if the text is not a filter, or if a part of it is a single word that
/// is not a level.
pub fn parse(level: &str) -> Result<EnvFilter, String> {
    let refused = |error: String| {
        format!("{level:?}: {error}: use error, warn, info, debug or trace, or a filter of these")
    };
    // EnvFilter parses a misspelled level as the name of a module.
    let mut words = level.split(',').filter(|word| !word.contains(['=', '[']));
    // LevelFilter parses the empty string as `error`.
    let is_wrong = |word: &&str| level.is_empty() || word.parse::<LevelFilter>().is_err();
    if let Some(word) = words.find(is_wrong) {
        return Err(refused(format!("{word:?} is not a level")));
    }
    EnvFilter::try_new(with_crates(level)).map_err(|error| refused(error.to_string()))
}

/// Crates of the agent that log, and the module of `skein_agent` that a filter names each by.
const CRATES: [(&str, &str); 4] = [
    ("dataplane", "skein_dataplane"),
    ("firewall", "skein_netlink::firewall"),
    ("netlink", "skein_netlink"),
    ("sys", "skein_sys"),
];

/// Extends the directives of a filter for `skein_agent` and its modules to the crates that the agent
/// consists of. A directive for a crate itself takes precedence.
fn with_crates(filter: &str) -> String {
    let ends = |rest: &&str| rest.is_empty() || rest.starts_with(['=', '[']);
    let of_crates = filter.split(',').flat_map(|directive| {
        let agent = directive.strip_prefix("skein_agent");
        CRATES.iter().filter_map(move |(module, name)| match agent?.strip_prefix("::") {
            Some(path) => path.strip_prefix(module).map(|rest| format!("{name}{rest}")),
            None => agent.filter(ends).map(|rest| format!("{name}{rest}")),
        })
    });
    let mut all: Vec<_> = of_crates.collect();
    all.push(filter.to_owned());
    all.join(",")
}

/// How often each place has spoken, by its name: `event agent/src/http.rs:70`.
#[derive(Default)]
struct Bounds(HashMap<&'static str, Place>);

struct Place {
    left: u32,
    refilled: Instant,
    left_out: u64,
}

impl Bounds {
    /// Whether the place may speak; else it is counted.
    fn take(&mut self, place: &'static str, now: Instant) -> bool {
        let full = || Place { left: BURST, refilled: now, left_out: 0 };
        let place = self.0.entry(place).or_insert_with(full);
        let earned = now.saturating_duration_since(place.refilled).div_duration_f64(EVERY) as u32;
        if earned > 0 {
            place.left = place.left.saturating_add(earned).min(BURST);
            place.refilled = now;
        }
        let Some(left) = place.left.checked_sub(1) else {
            place.left_out += 1;
            return false;
        };
        place.left = left;
        true
    }

    /// What was left out since the last call: where, and how often.
    fn left_out(&mut self) -> Vec<(&'static str, u64)> {
        let places = self.0.iter_mut().filter(|(_, place)| place.left_out > 0);
        places.map(|(name, place)| (*name, std::mem::take(&mut place.left_out))).collect()
    }
}

/// The bound as a filter.
struct Bound;

impl<S> Filter<S> for Bound {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let Some(log) = LOG.get() else { return true };
        let may = lock(&log.bounds).take(event.metadata().name(), Instant::now());
        if !may && let Some(teller) = log.teller.get_or_init(start_teller) {
            teller.unpark();
        }
        may
    }
}

fn start_teller() -> Option<Thread> {
    let teller = std::thread::Builder::new().name("log".to_owned()).spawn(tell);
    teller.ok().map(|thread| thread.thread().clone())
}

/// Writes what was left out. Its own lines come from one place, too, but not often enough to be bounded.
fn tell() {
    loop {
        std::thread::park();
        std::thread::sleep(TELL);
        let Some(log) = LOG.get() else { continue };
        let left_out = lock(&log.bounds).left_out();
        for (place, lines) in left_out {
            tracing::warn!(place, lines, "lines of the log were left out");
        }
    }
}

fn lock(bounds: &Mutex<Bounds>) -> MutexGuard<'_, Bounds> {
    // Nothing under the lock can panic half way.
    bounds.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_speaks_without_end_is_bounded_and_counted() {
        let (mut bounds, now) = (Bounds::default(), Instant::now());
        let (loud, quiet) = ("event a.rs:1", "event a.rs:2");
        let said = (0..1000).filter(|_| bounds.take(loud, now)).count();
        assert_eq!(said, BURST as usize);
        assert!(bounds.take(quiet, now), "another place is not held to it");
        assert_eq!(bounds.left_out(), [(loud, 1000 - u64::from(BURST))]);
        assert!(bounds.left_out().is_empty());
        let later = now + EVERY * 3;
        assert_eq!((0..10).filter(|_| bounds.take(loud, later)).count(), 3);
        let rested = later + EVERY * 1000;
        assert_eq!((0..1000).filter(|_| bounds.take(loud, rested)).count(), BURST as usize);
    }

    #[test]
    fn filter_of_the_agent_applies_to_its_crates() {
        assert_eq!(with_crates("debug"), "debug");
        assert_eq!(
            with_crates("skein_agent=debug,info"),
            "skein_dataplane=debug,skein_netlink::firewall=debug,skein_netlink=debug,skein_sys=debug,\
             skein_agent=debug,info"
        );
        assert_eq!(
            with_crates("skein_agent::dataplane::lane=trace"),
            "skein_dataplane::lane=trace,skein_agent::dataplane::lane=trace"
        );
        assert_eq!(with_crates("skein_agent::control=trace"), "skein_agent::control=trace");
        assert_eq!(with_crates("skein_agents=trace"), "skein_agents=trace");
        let exact = parse("skein_agent=debug,skein_sys=warn").unwrap().to_string();
        assert!(exact.contains("skein_sys=warn") && !exact.contains("skein_sys=debug"), "{exact}");
    }

    #[test]
    fn what_is_no_level_is_said() {
        assert!(parse("skein_agent=debug,info").is_ok());
        assert!(parse("skein_agent=loud").unwrap_err().contains("use error, warn, info"));
        for filter in ["INFO", "off", "[span{a}]=debug,info", "skein_agent[span]=trace"] {
            assert!(parse(filter).is_ok(), "{filter} is a filter");
        }
        for wrong in ["loud", "skein_agent", "info,loud", ""] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains("is not a level"), "{wrong}: {error}");
        }
    }
}
