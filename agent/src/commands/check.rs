//! `skein-agent check`: features of this kernel and machine that Skein uses.

use clap::Args;
use skein_netlink::firewall::probe;
use skein_sys::probe::{Probe, probe_all};

use super::{ConfigArgs, Output, OutputArgs, json, print, runtime};
use crate::config::{Config, DEFAULT_INTERFACE};
use crate::failure::Failure;
use crate::status::{Align, Field, Tone, table};

/// Consequence of a missing nftables table, appended to the detail of its probe.
const OPEN_BORDER: &str = "without it, frames with a pod's source are accepted from the underlay, and packets \
                           to unknown pods can leave the node in clear";

#[derive(Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn check(arguments: &CheckArgs) -> Result<(), Failure> {
    let config = arguments.config.load_if_present().map_err(|failure| failure.to_string());
    let config = config.as_ref().map(Option::as_ref).map_err(Clone::clone);
    let probes = runtime()?.block_on(probes(config));
    print(&match arguments.output.output {
        Output::Json => json(&document(&probes))?,
        Output::Table => render(&probes),
    })?;
    let missing = || probes.iter().filter(|probe| probe.required && !probe.ok);
    let list = |probes: Vec<&Probe>| {
        let names: Vec<_> = probes.iter().map(|p| format!("{}: {}", p.name, p.detail)).collect();
        format!("missing: {}", names.join("; "))
    };
    let privileges: Vec<_> = missing().filter(|p| p.name.starts_with("cap_")).collect();
    if !privileges.is_empty() {
        return Err(Failure::Privilege(list(privileges)));
    }
    match missing().collect::<Vec<_>>() {
        none if none.is_empty() => Ok(()),
        some => Err(Failure::Missing(list(some))),
    }
}

/// Returns the probes of kernel, machine and firewall. `config` is `None` before installation.
pub(crate) async fn probes(config: Result<Option<&Config>, String>) -> Vec<Probe> {
    let mut probes = probe_all();
    probes.extend(firewall_probes(config).await);
    probes
}

/// Loads the table in a new network namespace, and examines the forward chains of other programs
/// for the configured interface. Without a configuration, the default interface and pods of the CNI
/// plugin are assumed. An error of the configuration becomes the result of the second probe.
async fn firewall_probes(config: Result<Option<&Config>, String>) -> [Probe; 2] {
    let table = probe::table()
        .map(|()| "the kernel accepts Skein's nftables table".to_owned())
        .map_err(|why| format!("{why}; {OPEN_BORDER}"));
    let open = async |interface: &str, pods| match probe::forward_chains(interface, pods).await {
        Ok(()) => Ok("no chain of another program drops forwarded packets".to_owned()),
        Err(closed) => Err(closed.to_string()),
    };
    let closed = match config {
        Ok(Some(config)) => open(&config.interface.name, config.cni.enabled).await,
        Ok(None) => {
            let note = |text| format!("before installation: {text}");
            open(DEFAULT_INTERFACE, true).await.map(note).map_err(note)
        }
        Err(error) => Err(format!("not examined: {error}")),
    };
    [("nftables", table), ("forward_chains", closed)].map(|(name, result)| Probe {
        name,
        ok: result.is_ok(),
        detail: result.unwrap_or_else(|why| why),
        required: false,
    })
}

/// Returns the probes as the JSON output of `check` and `sysdump`.
pub(crate) fn document(probes: &[Probe]) -> serde_json::Value {
    let entry = |probe: &Probe| {
        serde_json::json!({
            "name": probe.name,
            "ok": probe.ok,
            "required": probe.required,
            "detail": probe.detail,
        })
    };
    probes.iter().map(entry).collect()
}

fn render(probes: &[Probe]) -> String {
    let row = |probe: &Probe| {
        let state = match (probe.ok, probe.required) {
            (true, _) => Field::toned("ok", Tone::Good),
            (false, true) => Field::toned("MISSING", Tone::Bad),
            (false, false) => Field::toned("absent", Tone::Warn),
        };
        vec![probe.name.into(), state, probe.detail.as_str().into()]
    };
    let columns = [("FEATURE", Align::Left), ("STATE", Align::Left), ("DETAIL", Align::Left)];
    table(&columns, probes.iter().map(row)) + "\n"
}
