//! `skein-agent capture`: inner packets as they cross the tunnel, for tcpdump and Wireshark.

mod pcap;

use std::io::{IsTerminal, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use ipnet::IpNet;
use serde::Serialize;
use skein_core::address;
use skein_ipc::capture::{CaptureKind, CaptureRequest};
use skein_sys::files;
use tokio::time::Instant;

use self::pcap::Pcap;
use super::{Agent, AgentArgs, Output, OutputArgs, json, print, runtime, seconds, watching};
use crate::failure::Failure;
use crate::lifecycle::Signals;
use crate::status::Document;

#[derive(Args)]
pub(crate) struct CaptureArgs {
    /// A peer's name, a pod's address, or a prefix; without it all inner packets
    what: Option<String>,
    /// Where to write them, as pcap (LINKTYPE_RAW); - is standard output
    #[arg(short, long, default_value = "-")]
    write: PathBuf,
    /// End after so many packets
    #[arg(long, default_value_t = 10_000)]
    count: u64,
    /// End after so many seconds
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// End when the file has so many bytes
    #[arg(long, default_value_t = 64 << 20)]
    bytes: u64,
    /// Bytes of each packet that are kept
    #[arg(long, default_value_t = 65_535)]
    snaplen: u32,
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What came of it.
#[derive(Serialize)]
struct Outcome {
    file: PathBuf,
    packets: u64,
    bytes: u64,
    /// Packets that came faster than they could be taken.
    missed: u64,
}

pub(crate) fn capture(arguments: &CaptureArgs) -> Result<(), Failure> {
    let standard = arguments.write == Path::new("-");
    if standard && std::io::stdout().is_terminal() {
        return Err(Failure::Usage(
            "packets are not for a terminal: name a file (-w FILE), or read them (| tcpdump -r -)"
                .to_owned(),
        ));
    }
    let time = seconds("--seconds", arguments.seconds)?;
    let agent = arguments.agent.agent()?;
    let outcome = runtime()?.block_on(run(arguments, &agent, time))?;
    let text = match arguments.output.output {
        Output::Json => json(&outcome)?,
        Output::Table => format!(
            "{} packets ({} bytes) captured, {} missed\n",
            outcome.packets, outcome.bytes, outcome.missed
        ),
    };
    match standard {
        // Standard output has the packets.
        true => drop(std::io::stderr().write_all(text.as_bytes())),
        false => print(&text)?,
    }
    Ok(())
}

async fn run(arguments: &CaptureArgs, agent: &Agent, time: Duration) -> Result<Outcome, Failure> {
    let mut signals = Signals::take().map_err(|e| Failure::io("cannot take signals", e))?;
    let status = agent.status().await?;
    let nets = match &arguments.what {
        Some(what) => nets(what, &status)?,
        None => Vec::new(),
    };
    let watch = CaptureRequest { kind: CaptureKind::Packets, nets, snap: arguments.snaplen };
    let mut client = watching::begin(&status, watch).await?;
    let shown = arguments.write.display();
    let failed = |error| Failure::io(format!("cannot write to {shown}"), error);
    let mut pcap = Pcap::begin(open(&arguments.write)?, arguments.snaplen).map_err(failed)?;
    let (mut packets, mut missed, end) = (0, 0, Instant::now() + time);
    'all: while packets < arguments.count {
        let (seen, more) = tokio::select! {
            seen = client.seen() => seen.map_err(watching::failure)?,
            () = signals.end() => break,
            () = tokio::time::sleep_until(end) => break,
        };
        missed += more;
        for seen in &seen {
            if packets >= arguments.count || pcap.would_be(seen) > arguments.bytes {
                break 'all;
            }
            match pcap.write(seen) {
                // Whoever read it has enough.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => break 'all,
                written => written.map_err(failed)?,
            }
            packets += 1;
        }
        match pcap.flush() {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => break,
            flushed => flushed.map_err(failed)?,
        }
    }
    match pcap.flush() {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        flushed => flushed.map_err(failed)?,
    }
    Ok(Outcome { file: arguments.write.clone(), packets, bytes: pcap.len(), missed })
}

/// A peer's pods, a pod, or a prefix.
fn nets(what: &str, status: &Document) -> Result<Vec<IpNet>, Failure> {
    if let Ok(net) = address::parse::<IpNet>(what) {
        return Ok(vec![net]);
    }
    if let Ok(address) = address::parse::<IpAddr>(what) {
        return Ok(vec![address.into()]);
    }
    let peers = super::report(status)?.peers.iter();
    let peer = peers.into_iter().find(|peer| peer.name == what);
    peer.map(|peer| peer.pod_cidrs.clone()).ok_or_else(|| {
        Failure::Usage(format!("{what:?} is neither a peer nor an address: see skein-agent peers"))
    })
}

/// Opens the output for its owner only, because the packets are the pods'.
fn open(path: &Path) -> Result<Box<dyn Write>, Failure> {
    if path == Path::new("-") {
        return Ok(Box::new(std::io::stdout()));
    }
    match files::recreate(path, 0o600) {
        Ok(file) => Ok(Box::new(file)),
        Err(error) => Err(Failure::io(format!("cannot write {}", path.display()), error)),
    }
}
