//! `skein-agent top`: current rates, batch sizes, drops and peers, refreshed periodically.

mod sample;
mod screen;

use std::io::IsTerminal;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use clap::Args;
use crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers};
use crossterm::{event, terminal};
use futures_util::FutureExt;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use tokio::runtime::Runtime;

use self::sample::Sample;
use self::screen::Screen;
use super::{Agent, AgentArgs, Output, OutputArgs, json, print, report, runtime, seconds};
use crate::failure::Failure;
use crate::lifecycle::Signals;
use crate::status::Document;

/// Interval at which the terminal's keys and the signals are polled.
const KEY_POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Size of a single sample, columns and lines. The lines are not limited, because a terminal
/// scrolls.
const ONCE_SIZE: (usize, usize) = (200, usize::MAX);

#[derive(Args)]
pub(crate) struct TopArgs {
    /// Print one sample and exit; this is the default if the output is not a terminal
    #[arg(long)]
    once: bool,
    /// Seconds between two samples
    #[arg(long, default_value_t = 1.0)]
    interval: f64,
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn top(arguments: &TopArgs) -> Result<(), Failure> {
    let agent = arguments.agent.agent()?;
    let interval = seconds("--interval", arguments.interval)?;
    if interval < KEY_POLL_INTERVAL {
        return Err(Failure::Usage("--interval is too short. Use 0.1 seconds or more.".to_owned()));
    }
    let runtime = runtime()?;
    let output = arguments.output.output;
    let terminal = std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
    if arguments.once || output == Output::Json || !terminal {
        let sample = runtime.block_on(async {
            let before = timed_status(&agent).await?;
            tokio::time::sleep(interval).await;
            sample(&before, &timed_status(&agent).await?)
        })?;
        return print(&match output {
            Output::Json => json(&sample)?,
            Output::Table => screen::lines(&sample, ONCE_SIZE).join("\n") + "\n",
        });
    }
    refresh(&runtime, &agent, interval)
}

/// Status of the agent and the time at which it was received.
type TimedStatus = (Document, Instant);

async fn timed_status(agent: &Agent) -> Result<TimedStatus, Failure> {
    Ok((agent.status().await?, Instant::now()))
}

fn sample((before, then): &TimedStatus, (now, at): &TimedStatus) -> Result<Sample, Failure> {
    report(now)?;
    Ok(Sample::between(before, now, at.duration_since(*then)))
}

/// Shows samples until a key, a signal or a closed terminal ends the command.
fn refresh(runtime: &Runtime, agent: &Agent, interval: Duration) -> Result<(), Failure> {
    let failed = |error| Failure::io("cannot use the terminal", error);
    let mut before = runtime.block_on(timed_status(agent))?;
    let mut signals = runtime.block_on(async { Signals::install() }).map_err(failed)?;
    let mut screen = Screen::open().map_err(failed)?;
    let mut shown = Ok(None);
    loop {
        // The agent may restart. The screen shows the error, and the next sample is tried.
        match &shown {
            Ok(Some(sample)) => screen.show(|size| screen::lines(sample, size)),
            Ok(None) => screen.show(|_| vec!["waiting for the first sample …".to_owned()]),
            Err(failure) => screen.show(|_| vec![format!("{failure}"), "q: quit".to_owned()]),
        }
        .map_err(failed)?;
        let next = Instant::now() + interval;
        while Instant::now() < next {
            let ended = runtime.block_on(async { signals.terminated().now_or_never() });
            if ended.is_some() || quits(KEY_POLL_INTERVAL).map_err(failed)? {
                return Ok(());
            }
        }
        shown = runtime.block_on(timed_status(agent)).and_then(|now| {
            let sample = sample(&before, &now);
            before = now;
            sample.map(Some)
        });
    }
}

/// Waits up to `timeout` for a key that ends the command. A terminal that has hung up ends it, too.
fn quits(timeout: Duration) -> std::io::Result<bool> {
    // crossterm ignores its timeout after the terminal has hung up and polls forever.
    let readiness = wait_readable(std::io::stdin().as_fd(), timeout)?;
    if readiness.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
        return Ok(true);
    }
    if !readiness.contains(PollFlags::IN) || !event::poll(Duration::ZERO)? {
        return Ok(false);
    }
    let Event::Key(key) = event::read()? else { return Ok(false) };
    // In raw mode the terminal sends no signal for Ctrl-C.
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    Ok(key.kind != KeyEventKind::Release
        && match key.code {
            KeyCode::Char('q') | KeyCode::Esc => true,
            KeyCode::Char('c' | 'd') => control,
            _ => false,
        })
}

/// Waits up to `timeout` for input or the end of the terminal and returns the events of poll(2).
fn wait_readable(terminal: BorrowedFd<'_>, timeout: Duration) -> std::io::Result<PollFlags> {
    let mut polled = [PollFd::from_borrowed_fd(terminal, PollFlags::IN)];
    let timeout = timeout.try_into().map_err(std::io::Error::other)?;
    match rustix::event::poll(&mut polled, Some(&timeout)) {
        Ok(_) => Ok(polled[0].revents()),
        Err(Errno::INTR) => Ok(PollFlags::empty()),
        Err(error) => Err(error.into()),
    }
}

/// Returns columns and lines of the terminal; 80 and 24 if they are unknown.
fn size() -> (usize, usize) {
    let (width, height) = terminal::size().unwrap_or((80, 24));
    (usize::from(width), usize::from(height))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::OwnedFd;

    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

    use super::*;

    /// Opens a pseudo-terminal and returns its controlling side and its terminal.
    fn terminal() -> (OwnedFd, OwnedFd) {
        let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("no pseudo-terminal");
        grantpt(&control).expect("grantpt failed");
        unlockpt(&control).expect("unlockpt failed");
        let name = ptsname(&control, Vec::new()).expect("the terminal has no name");
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let terminal = rustix::fs::open(name, flags, rustix::fs::Mode::empty());
        (control, terminal.expect("cannot open the terminal"))
    }

    #[test]
    fn closed_terminal_is_seen_as_hung_up() {
        let (control, terminal) = terminal();
        let before = wait_readable(terminal.as_fd(), Duration::ZERO).expect("poll failed");
        assert_eq!(before, PollFlags::empty());
        drop(control);
        let after = wait_readable(terminal.as_fd(), Duration::from_secs(60)).expect("poll failed");
        assert!(after.contains(PollFlags::HUP));
    }

    #[test]
    fn typed_key_is_seen_as_input() {
        let (control, terminal) = terminal();
        let mut control = std::fs::File::from(control);
        control.write_all(b"q\n").expect("cannot write to the terminal");
        let events = wait_readable(terminal.as_fd(), Duration::from_secs(60)).expect("poll failed");
        assert!(events.contains(PollFlags::IN));
    }
}
