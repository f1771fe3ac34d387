//! `skein-agent status`: everything at a glance.

use std::time::Instant;

use clap::Args;

use super::{AgentArgs, Output, OutputArgs, json, print, runtime, seconds};
use crate::failure::Failure;
use crate::status;

#[derive(Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Seconds between the two looks that rates are computed from; 0: one look, no rates
    #[arg(long, default_value_t = 1.0)]
    interval: f64,
}

pub(crate) fn status(arguments: &StatusArgs) -> Result<(), Failure> {
    let agent = arguments.agent.agent()?;
    let interval = seconds("--interval", arguments.interval)?;
    let text = runtime()?.block_on(async {
        let first = agent.status().await?;
        match arguments.output.output {
            Output::Json => json(&first),
            Output::Table if interval.is_zero() || first.report.is_none() => {
                Ok(status::render(&first, None))
            }
            Output::Table => {
                let started = Instant::now();
                tokio::time::sleep(interval).await;
                let second = agent.status().await?;
                Ok(status::render(&second, Some((&first, started.elapsed()))))
            }
        }
    })?;
    print(&text)
}
