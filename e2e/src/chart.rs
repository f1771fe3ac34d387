//! The Helm chart as it is rendered.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use crate::cargo::workspace;
use crate::lab::process::{self, Finished};
use crate::programs;

/// Where the policy that holds agents to their own node is served.
const POLICIES: &str = "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy";

/// How long one program may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Its directory.
pub fn path() -> PathBuf {
    workspace().join("charts/skein")
}

/// Runs helm with these settings.
pub fn helm(arguments: &[&str], settings: &[&str]) -> Result<Finished> {
    let mut helm = Command::new(programs::helm()?);
    // Nobody's own repositories and plugins.
    let home = tempfile::tempdir()?;
    for place in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        helm.env(place, home.path());
    }
    helm.args(arguments).args(settings.iter().flat_map(|setting| ["--set", setting]));
    process::finish(&mut helm, &[], LIMIT)
}

/// Everything that helm would send to the API server, as text.
pub fn render(settings: &[&str], version: &str) -> Result<String> {
    let chart = path().to_string_lossy().into_owned();
    let mut arguments = vec!["template", "skein", &chart, "--namespace", "net"];
    arguments.extend(["--kube-version", version]);
    if version >= "1.30" {
        arguments.extend(["--api-versions", POLICIES]);
    }
    let finished = helm(&arguments, settings)?;
    ensure!(finished.code == 0, "helm template {settings:?}: {}", finished.stderr);
    Ok(finished.stdout)
}

/// The one object of this kind and name.
pub fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let of = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
    let found: Vec<_> = objects.iter().filter(of).collect();
    match found[..] {
        [one] => Ok(one),
        _ => bail!("{} objects {kind} {name}", found.len()),
    }
}

/// The same as objects, for a current Kubernetes.
pub fn rendered(settings: &[&str]) -> Result<Vec<Value>> {
    programs::yaml(&render(settings, "1.34")?)
}
