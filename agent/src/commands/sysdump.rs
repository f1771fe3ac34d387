//! `skein-agent sysdump`: archive of state, logs and network configuration for support, without
//! secrets.

mod archive;
mod collect;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::Args;
use skein_sys::files;

use self::archive::Archive;
use super::{AgentArgs, Output, OutputArgs, json, print, runtime};
use crate::control::rotation;
use crate::failure::Failure;
use crate::status::{Align, bytes, table};

#[derive(Args)]
pub(crate) struct SysdumpArgs {
    /// Output file; - for standard output [default: skein-sysdump-NODE-TIME.tar.gz]
    file: Option<PathBuf>,
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn sysdump(arguments: &SysdumpArgs) -> Result<(), Failure> {
    let config = arguments.agent.config.load()?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let name = format!("skein-sysdump-{}-{}", config.name, now.as_secs());
    let file = arguments.file.clone().unwrap_or_else(|| format!("{name}.tar.gz").into());
    let mut archive = Archive::new(&name, now.as_secs(), &rotation::files::all(&config.key_path()));
    runtime()?.block_on(collect::collect(&mut archive, &config, &arguments.agent.agent()?));
    let entries = archive.entries();
    let packed =
        archive.finish().map_err(|error| Failure::io("cannot compress the archive", error))?;
    if file == Path::new("-") {
        let written = std::io::stdout().write_all(&packed);
        return written.map_err(|error| Failure::io("cannot write the archive", error));
    }
    write(&file, &packed)?;
    let shown = file.display();
    print(&match arguments.output.output {
        Output::Json => json(&serde_json::json!({
            "file": shown.to_string(), "bytes": packed.len(), "entries": entries,
        }))?,
        Output::Table => {
            let row = |entry: &archive::Entry| {
                let size = bytes(entry.bytes as u64);
                vec![entry.name.clone(), size, entry.note.clone().unwrap_or_default()]
            };
            let columns = [("FILE", Align::Left), ("SIZE", Align::Right), ("NOTE", Align::Left)];
            let size = bytes(packed.len() as u64);
            format!("{}\n\n{shown} ({size})\n", table(&columns, entries.iter().map(row)))
        }
    })
}

/// Writes the archive with mode 0600, because it contains addresses and logs.
fn write(file: &Path, packed: &[u8]) -> Result<(), Failure> {
    let written = files::create_new(file, 0o600).and_then(|mut file| file.write_all(packed));
    written.map_err(|error| {
        let shown = file.display();
        match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Failure::Usage(format!("{shown} already exists. Choose another file."))
            }
            _ => Failure::io(format!("cannot write {shown}"), error),
        }
    })
}
