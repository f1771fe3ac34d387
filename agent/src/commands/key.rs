//! `skein-agent keygen`, `pubkey` and `rotate-key`.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use skein_ipc::keys::PrivateKey;
use zeroize::Zeroizing;

use super::{AgentArgs, Output, OutputArgs, json, print, runtime};
use crate::config::Config;
use crate::control::{agent_client, identity};
use crate::failure::Failure;

pub(crate) fn keygen(out: Option<&Path>) -> Result<(), Failure> {
    let key = PrivateKey::generate().context("cannot generate a private key")?;
    match out {
        Some(path) => {
            identity::store(path, &key)?;
            print(&format!("{}\n", key.public().context("cannot compute the public key")?))
        }
        None => {
            let mut text = key.to_base64();
            text.push('\n');
            print(&text)
        }
    }
}

pub(crate) fn pubkey(file: Option<PathBuf>, config: Option<PathBuf>) -> Result<(), Failure> {
    let path = match (file, config) {
        (None, Some(config)) => Some(Config::load(&config, None)?.key_path()),
        (file, _) => file,
    };
    let key = match path {
        Some(path) => identity::load(&path)?.ok_or_else(|| {
            let shown = path.display();
            Failure::Usage(format!(
                "the private key file {shown} does not exist. Create it with skein-agent keygen --out \
                 {shown}."
            ))
        })?,
        None => {
            let mut text = Zeroizing::new(String::with_capacity(1024));
            std::io::stdin()
                .take(1024)
                .read_to_string(&mut text)
                .context("cannot read the private key from standard input")?;
            text.parse::<PrivateKey>().map_err(|error| {
                Failure::Usage(format!("standard input contains no valid private key: {error}"))
            })?
        }
    };
    print(&format!("{}\n", key.public().context("cannot compute the public key")?))
}

#[derive(Args)]
pub(crate) struct RotateArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// Replace a compromised key immediately; traffic with other nodes is interrupted until they
    /// have the new key
    #[arg(long)]
    at_once: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn rotate(arguments: &RotateArgs) -> Result<(), Failure> {
    let agent = arguments.agent.agent()?;
    let answer = runtime()?.block_on(agent_client::rotate_key(agent.socket(), arguments.at_once));
    let status = answer.map_err(|error| agent.failure(error))?;
    print(&match (arguments.output.output, status.keys.second, &status.waits_for) {
        (Output::Json, ..) => json(&status)?,
        (Output::Table, Some(next), Some(waits_for)) => {
            format!("next public key: {next}\nwaiting for {waits_for}\n")
        }
        (Output::Table, ..) => format!("public key: {}\n", status.keys.first),
    })
}
