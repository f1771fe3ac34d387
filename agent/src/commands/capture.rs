//! `skein-agent capture`: writes inner packets of the tunnel as pcap, for tcpdump and Wireshark.

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
use super::{Agent, AgentArgs, Output, OutputArgs, capture_client, json, print, runtime, seconds};
use crate::failure::Failure;
use crate::lifecycle::Signals;
use crate::status::Document;

#[derive(Args)]
pub(crate) struct CaptureArgs {
    /// Name of a peer, address of a pod, or prefix [default: all inner packets]
    what: Option<String>,
    /// Output file, pcap with LINKTYPE_RAW; - for standard output
    #[arg(short, long, default_value = "-")]
    write: PathBuf,
    /// Maximum number of packets
    #[arg(long, default_value_t = 10_000)]
    count: u64,
    /// Maximum duration in seconds
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// Maximum size of the output in bytes
    #[arg(long, default_value_t = 64 << 20)]
    bytes: u64,
    /// Maximum number of bytes kept of each packet
    #[arg(long, default_value_t = 65_535)]
    snaplen: u32,
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Result of a capture.
#[derive(Serialize)]
struct CaptureResult {
    file: PathBuf,
    packets: u64,
    bytes: u64,
    /// Packets that the data process could not queue for this command.
    missed: u64,
}

pub(crate) fn capture(arguments: &CaptureArgs) -> Result<(), Failure> {
    let standard = arguments.write == Path::new("-");
    if standard && std::io::stdout().is_terminal() {
        return Err(Failure::Usage(
            "standard output is a terminal. Write to a file (-w FILE) or to a pipe (| tcpdump -r -)."
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
        // The packets go to standard output.
        true => drop(std::io::stderr().write_all(text.as_bytes())),
        false => print(&text)?,
    }
    Ok(())
}

async fn run(
    arguments: &CaptureArgs,
    agent: &Agent,
    time: Duration,
) -> Result<CaptureResult, Failure> {
    let mut signals =
        Signals::install().map_err(|e| Failure::io("cannot install signal handlers", e))?;
    let status = agent.status().await?;
    let nets = match &arguments.what {
        Some(what) => nets(what, &status)?,
        None => Vec::new(),
    };
    let watch = CaptureRequest { kind: CaptureKind::Packets, nets, snap: arguments.snaplen };
    let mut client = capture_client::start_capture(&status, watch).await?;
    let shown = arguments.write.display();
    let failed = |error| Failure::io(format!("cannot write to {shown}"), error);
    let mut pcap = Pcap::begin(open(&arguments.write)?, arguments.snaplen).map_err(failed)?;
    let (mut packets, mut missed, end) = (0, 0, Instant::now() + time);
    'all: while packets < arguments.count {
        let (seen, more) = tokio::select! {
            seen = client.next_captured() => seen.map_err(capture_client::failure)?,
            () = signals.terminated() => break,
            () = tokio::time::sleep_until(end) => break,
        };
        missed += more;
        for seen in &seen {
            if packets >= arguments.count || pcap.length_with(seen) > arguments.bytes {
                break 'all;
            }
            match pcap.write(seen) {
                // The reader of the pipe has ended.
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
    Ok(CaptureResult { file: arguments.write.clone(), packets, bytes: pcap.len(), missed })
}

/// Parses a prefix, an address, or the name of a peer, which stands for its pod CIDRs.
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
        Failure::Usage(format!(
            "{what:?} is neither a peer nor an address nor a prefix. See skein-agent peers."
        ))
    })
}

/// Opens the output with mode 0600, because the packets are traffic of pods.
fn open(path: &Path) -> Result<Box<dyn Write>, Failure> {
    if path == Path::new("-") {
        return Ok(Box::new(std::io::stdout()));
    }
    match files::recreate(path, 0o600) {
        Ok(file) => Ok(Box::new(file)),
        Err(error) => Err(Failure::io(format!("cannot write {}", path.display()), error)),
    }
}
