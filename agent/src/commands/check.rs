//! `skein-agent check`: what this kernel and machine support.

use super::{Output, json, print, runtime};
use crate::failure::Failure;
use crate::firewall;
use crate::status::{Align, Field, Tone, table};
use crate::sys::probe::{Probe, probe_all};

pub(crate) fn check(output: Output) -> Result<(), Failure> {
    let probes = runtime()?.block_on(probes());
    print(&match output {
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

/// Answers about kernel, machine and firewall.
pub(crate) async fn probes() -> Vec<Probe> {
    let mut probes = probe_all();
    probes.extend(firewall::probe::probe().await);
    probes
}

/// For programs.
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
    let columns = [("WHAT", Align::Left), ("STATE", Align::Left), ("DETAIL", Align::Left)];
    table(&columns, probes.iter().map(row)) + "\n"
}
