//! Log on standard error as text or JSON lines, with a level that can be changed at run time and a
//! rate limit per call site.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::{Event, Metadata};
use tracing_subscriber::filter::{LevelFilter, ParseError};
use tracing_subscriber::layer::{Context, Filter, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// Maximum number of lines that a call site writes in a burst.
const MAX_BURST: u32 = 50;
/// Interval after which a call site may write one more line.
const REFILL_INTERVAL: Duration = Duration::from_millis(200);
/// Interval of the lines that report suppressed lines.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Configuration of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Filter directives of `tracing`, for example `info` or `skein_agent=debug,info`.
    pub level: String,
    /// Format of the lines.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::default() }
    }
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// Text for people
    #[default]
    Text,
    /// One JSON object per line
    Json,
}

impl LogFormat {
    /// Returns the value of `--log-format`.
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
    /// Level with which the process was started.
    configured: String,
    limits: Mutex<RateLimits>,
    /// Thread that reports suppressed lines. It is parked while no line is suppressed. It starts on
    /// first use, because the process drops its privileges at start for the calling thread only.
    reporter: OnceLock<Option<Thread>>,
}

/// Starts the log. The environment variable `SKEIN_LOG` overrides the level. Has no effect if a log
/// was started before.
pub fn start(log: &Log) {
    let configured = std::env::var("SKEIN_LOG")
        .ok()
        .filter(|text| EnvFilter::try_new(with_crates(text)).is_ok());
    let configured = configured.unwrap_or_else(|| log.level.clone());
    let filter = EnvFilter::try_new(with_crates(&configured)).unwrap_or_default();
    let (filter, level) = reload::Layer::new(filter);
    // The reader of standard error may have ended. A failed write must not end the process, so the
    // line is discarded without an error.
    let lines = fmt::layer().with_writer(io::stderr).log_internal_errors(false);
    let lines = match log.format {
        LogFormat::Text => {
            let colours = io::IsTerminal::is_terminal(&io::stderr());
            lines.with_ansi(colours).with_target(false).boxed()
        }
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let started = tracing_subscriber::registry()
        .with(filter)
        .with(lines.with_filter(RateLimitFilter))
        .try_init();
    // `try_init` fails only if a log was started before; that log stays.
    if started.is_ok() {
        // `set` cannot fail, because `try_init` succeeds only once.
        let _ = LOG.set(State {
            level,
            configured,
            limits: Mutex::default(),
            reporter: OnceLock::new(),
        });
    }
}

/// Error of a level or of its change.
#[derive(Debug, thiserror::Error)]
pub enum LevelError {
    /// A directive is a single word that is not a level.
    #[error("{level:?}: {word:?} is not a level. {REMEDY}")]
    Unknown {
        /// The level, or filter, as a whole.
        level: String,
        /// The wrong directive.
        word: String,
    },
    /// The text is not a filter.
    #[error("{level:?}: {source}. {REMEDY}")]
    Filter {
        /// The level, or filter, as a whole.
        level: String,
        /// Error of the parser.
        source: ParseError,
    },
    /// The process has no log.
    #[error("the log has not been started")]
    NotStarted,
    /// The log cannot be changed.
    #[error(transparent)]
    Reload(#[from] reload::Error),
}

const REMEDY: &str = "Use error, warn, info, debug or trace, or a filter of these.";

/// Sets the level, in the syntax of `log.level`. `None` restores the level of the start.
///
/// # Errors
/// [`LevelError::NotStarted`] if no log was started, the errors of [`parse`], or
/// [`LevelError::Reload`] if the log cannot be changed.
pub fn set_level(level: Option<&str>) -> Result<(), LevelError> {
    let log = LOG.get().ok_or(LevelError::NotStarted)?;
    let level = level.unwrap_or(&log.configured);
    let filter = parse(level)?;
    log.level.reload(filter)?;
    tracing::info!(level, "log level changed");
    Ok(())
}

/// Parses a level, or a filter such as `skein_agent=debug,info`.
///
/// # Errors
/// [`LevelError::Filter`] if the text is not a filter, [`LevelError::Unknown`] if a directive is a
/// single word that is not a level.
pub fn parse(level: &str) -> Result<EnvFilter, LevelError> {
    // EnvFilter parses a misspelled level as the name of a module.
    let mut words = level.split(',').filter(|word| !word.contains(['=', '[']));
    // LevelFilter parses the empty string as `error`.
    let is_wrong = |word: &&str| level.is_empty() || word.parse::<LevelFilter>().is_err();
    if let Some(word) = words.find(is_wrong) {
        return Err(LevelError::Unknown { level: level.to_owned(), word: word.to_owned() });
    }
    EnvFilter::try_new(with_crates(level))
        .map_err(|source| LevelError::Filter { level: level.to_owned(), source })
}

/// Module names of `skein_agent` that a filter may use, and the crates that they stand for.
const CRATES: [(&str, &str); 4] = [
    ("dataplane", "skein_dataplane"),
    ("firewall", "skein_netlink::firewall"),
    ("netlink", "skein_netlink"),
    ("sys", "skein_sys"),
];

/// Extends the directives of a filter for `skein_agent` and its modules to the agent's other
/// crates. A directive for a crate itself takes precedence.
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

/// Rate limits of call sites by their names, for example `event agent/src/http.rs:70`.
#[derive(Default)]
struct RateLimits(HashMap<&'static str, CallSite>);

/// Token bucket of a call site.
struct CallSite {
    tokens: u32,
    refilled: Instant,
    suppressed: u64,
}

impl RateLimits {
    /// Returns whether the call site may write a line. A line that is suppressed is counted.
    fn try_acquire(&mut self, site: &'static str, now: Instant) -> bool {
        let full = || CallSite { tokens: MAX_BURST, refilled: now, suppressed: 0 };
        let site = self.0.entry(site).or_insert_with(full);
        let elapsed = now.saturating_duration_since(site.refilled);
        let earned = elapsed.div_duration_f64(REFILL_INTERVAL) as u32;
        if earned > 0 {
            site.tokens = site.tokens.saturating_add(earned).min(MAX_BURST);
            site.refilled = now;
        }
        let Some(tokens) = site.tokens.checked_sub(1) else {
            site.suppressed += 1;
            return false;
        };
        site.tokens = tokens;
        true
    }

    /// Returns the call sites with suppressed lines since the last call, and the number of lines.
    fn drain_suppressed(&mut self) -> Vec<(&'static str, u64)> {
        let sites = self.0.iter_mut().filter(|(_, site)| site.suppressed > 0);
        sites.map(|(name, site)| (*name, std::mem::take(&mut site.suppressed))).collect()
    }
}

/// Filter that applies [`RateLimits`] to events.
struct RateLimitFilter;

impl<S> Filter<S> for RateLimitFilter {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let Some(log) = LOG.get() else { return true };
        let allowed = lock(&log.limits).try_acquire(event.metadata().name(), Instant::now());
        if !allowed && let Some(reporter) = log.reporter.get_or_init(start_reporter) {
            reporter.unpark();
        }
        allowed
    }
}

fn start_reporter() -> Option<Thread> {
    let reporter = std::thread::Builder::new().name("log".to_owned()).spawn(report_suppressed);
    reporter.ok().map(|thread| thread.thread().clone())
}

/// Reports suppressed lines. The reports are too rare to be suppressed themselves.
fn report_suppressed() {
    loop {
        std::thread::park();
        std::thread::sleep(REPORT_INTERVAL);
        let Some(log) = LOG.get() else { continue };
        let suppressed = lock(&log.limits).drain_suppressed();
        for (call_site, lines) in suppressed {
            tracing::warn!(call_site, lines, "log lines suppressed");
        }
    }
}

fn lock(limits: &Mutex<RateLimits>) -> MutexGuard<'_, RateLimits> {
    // No code that holds the lock can leave the map inconsistent, so a poisoned lock is valid.
    limits.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn busy_call_site_is_limited_and_lines_are_counted() {
        let (mut limits, now) = (RateLimits::default(), Instant::now());
        let (busy, idle) = ("event a.rs:1", "event a.rs:2");
        let written = (0..1000).filter(|_| limits.try_acquire(busy, now)).count();
        assert_eq!(written, MAX_BURST as usize);
        assert!(limits.try_acquire(idle, now), "Another call site must not be limited.");
        assert_eq!(limits.drain_suppressed(), [(busy, 1000 - u64::from(MAX_BURST))]);
        assert!(limits.drain_suppressed().is_empty());
        let later = now + REFILL_INTERVAL * 3;
        assert_eq!((0..10).filter(|_| limits.try_acquire(busy, later)).count(), 3);
        let full = later + REFILL_INTERVAL * 1000;
        let written = (0..1000).filter(|_| limits.try_acquire(busy, full)).count();
        assert_eq!(written, MAX_BURST as usize);
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
    fn invalid_filter_is_error_with_remedy() {
        assert!(parse("skein_agent=debug,info").is_ok());
        let error = parse("skein_agent=loud").unwrap_err().to_string();
        assert!(error.contains("Use error, warn, info"), "{error}");
        for filter in ["INFO", "off", "[span{a}]=debug,info", "skein_agent[span]=trace"] {
            assert!(parse(filter).is_ok(), "{filter} is a filter");
        }
        for wrong in ["loud", "skein_agent", "info,loud", ""] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains("is not a level"), "{wrong}: {error}");
        }
    }
}
