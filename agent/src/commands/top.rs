//! `skein-agent top`: what passes now, again and again.

mod sample;
mod screen;

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers};
use crossterm::{event, terminal};
use futures_util::FutureExt;
use tokio::runtime::Runtime;

use self::sample::Sample;
use self::screen::Screen;
use super::{Agent, AgentArgs, Output, OutputArgs, json, print, report, runtime, seconds};
use crate::failure::Failure;
use crate::lifecycle::Signals;
use crate::status::Document;

/// How often keys and signals are looked at.
const KEYS: Duration = Duration::from_millis(100);
/// The size of what is printed once: a terminal scrolls.
const ONCE: (usize, usize) = (200, usize::MAX);

#[derive(Args)]
pub(crate) struct TopArgs {
    /// Print one sample and end, as when the output is no terminal
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
    if interval < KEYS {
        return Err(Failure::Usage("--interval: use 0.1 seconds or more".to_owned()));
    }
    let runtime = runtime()?;
    let output = arguments.output.output;
    let terminal = std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
    if arguments.once || output == Output::Json || !terminal {
        let sample = runtime.block_on(async {
            let before = look(&agent).await?;
            tokio::time::sleep(interval).await;
            sample(&before, &look(&agent).await?)
        })?;
        return print(&match output {
            Output::Json => json(&sample)?,
            Output::Table => screen::lines(&sample, ONCE).join("\n") + "\n",
        });
    }
    refresh(&runtime, &agent, interval)
}

/// The agent's status, and when it was.
type Look = (Document, Instant);

async fn look(agent: &Agent) -> Result<Look, Failure> {
    Ok((agent.status().await?, Instant::now()))
}

fn sample((before, then): &Look, (now, at): &Look) -> Result<Sample, Failure> {
    report(now)?;
    Ok(Sample::between(before, now, at.duration_since(*then)))
}

/// Shows samples until somebody has seen enough.
fn refresh(runtime: &Runtime, agent: &Agent, interval: Duration) -> Result<(), Failure> {
    let failed = |error| Failure::io("cannot use the terminal", error);
    let mut before = runtime.block_on(look(agent))?;
    let mut signals = runtime.block_on(async { Signals::take() }).map_err(failed)?;
    let mut screen = Screen::open().map_err(failed)?;
    let mut shown = Ok(None);
    loop {
        // An agent that is away may come back: the screen says so and goes on.
        match &shown {
            Ok(Some(sample)) => screen.show(|size| screen::lines(sample, size)),
            Ok(None) => screen.show(|_| vec!["the first sample is on its way …".to_owned()]),
            Err(failure) => screen.show(|_| vec![format!("{failure}"), "q: quit".to_owned()]),
        }
        .map_err(failed)?;
        let next = Instant::now() + interval;
        while Instant::now() < next {
            let ended = runtime.block_on(async { signals.end().now_or_never() });
            if ended.is_some() || quits(KEYS).map_err(failed)? {
                return Ok(());
            }
        }
        shown = runtime.block_on(look(agent)).and_then(|now| {
            let sample = sample(&before, &now);
            before = now;
            sample.map(Some)
        });
    }
}

/// Waits for a key that ends it. A terminal whose size has changed is drawn anew with the next sample.
fn quits(patience: Duration) -> std::io::Result<bool> {
    if !event::poll(patience)? {
        return Ok(false);
    }
    let Event::Key(key) = event::read()? else { return Ok(false) };
    // In raw mode the terminal makes no signal of Ctrl-C.
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    Ok(key.kind != KeyEventKind::Release
        && match key.code {
            KeyCode::Char('q') | KeyCode::Esc => true,
            KeyCode::Char('c' | 'd') => control,
            _ => false,
        })
}

/// Columns and lines of the terminal.
fn size() -> (usize, usize) {
    let (width, height) = terminal::size().unwrap_or((80, 24));
    (usize::from(width), usize::from(height))
}
