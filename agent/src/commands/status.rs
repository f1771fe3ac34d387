//! `skein-agent status`: everything at a glance.

use std::time::Instant;

use super::{LookArgs, Output, json, print, runtime, seconds};
use crate::failure::Failure;
use crate::status;

pub(crate) fn status(look: &LookArgs) -> Result<(), Failure> {
    let agent = look.agent.agent()?;
    let interval = seconds("--interval", look.interval)?;
    let text = runtime()?.block_on(async {
        let first = agent.status().await?;
        match look.output.output {
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
