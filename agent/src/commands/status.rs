//! `skein-agent status`: summary of the agent's state.

use std::time::Instant;

use super::{Output, SampleArgs, json, print, runtime, seconds};
use crate::failure::Failure;
use crate::status;

pub(crate) fn status(arguments: &SampleArgs) -> Result<(), Failure> {
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
