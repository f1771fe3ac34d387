//! Output for people: results on standard output, progress on standard error.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Progress display: a spinner or a bar on a terminal, plain lines otherwise.
pub struct Console {
    bar: Option<ProgressBar>,
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Console {
    /// Shows a spinner, for an unknown number of steps.
    pub fn new() -> Self {
        Self::with(|| ProgressBar::new_spinner().with_style(style("{spinner} {msg} [{elapsed}]")))
    }

    /// Shows a bar for `total` steps.
    pub fn with_total(total: u64) -> Self {
        Self::with(|| {
            let template = "{bar:30} {pos}/{len} {msg} [{elapsed}, {eta} left]";
            ProgressBar::new(total).with_style(style(template))
        })
    }

    fn with(make: impl FnOnce() -> ProgressBar) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = make();
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar }
    }

    /// Shows the step that starts now.
    pub fn step(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => eprintln!("… {text}"),
        }
    }

    /// Advances the bar by one step.
    pub fn advance(&self) {
        if let Some(bar) = &self.bar {
            bar.inc(1);
        }
    }

    /// Prints lines of the result to standard output.
    pub fn print(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{text}")),
            None => println!("{text}"),
        }
    }

    /// Hides the progress while `work`, which writes to the terminal, runs.
    pub fn pause<T>(&self, work: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) => bar.suspend(work),
            None => work(),
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
