//! Container image: equal programs make equal images, and both processes of the agent run in it
//! with the settings of the chart.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::{cgroup, process};
use skein_lab::{chart, skein_image};

/// Maximum compressed size of the image, bytes. Each node pulls it before pods can start.
const MAX_COMPRESSED_LEN: u64 = 20_000_000;

/// Returns the size of a file in bytes after compression by gzip, as registries store layers.
fn compressed_len(path: &Path) -> Result<u64> {
    let counted =
        process::run(Command::new("sh").args(["-c", "gzip -c \"$0\" | wc -c"]).arg(path))?;
    counted.trim().parse().with_context(|| counted.clone())
}

fn member(archive: &Path, name: &str) -> Result<Value> {
    let text = process::run(Command::new("tar").arg("-xOf").arg(archive).arg(name))?;
    serde_json::from_str(&text).with_context(|| name.to_owned())
}

#[test]
fn equal_programs_make_equal_images() -> Result<()> {
    let first = skein_image::build()?;
    let directory = tempfile::tempdir()?;
    let second = directory.path().join("second.tar");
    skein_image::pack(first.parent().context("no directory")?, &second)?;
    ensure!(fs::read(&first)? == fs::read(&second)?, "Two builds of the same programs differ.");
    Ok(())
}

#[test]
fn image_is_small_and_has_labels() -> Result<()> {
    let archive = skein_image::build()?;
    let (size, compressed) = (fs::metadata(&archive)?.size(), compressed_len(&archive)?);
    println!("the image has {size} bytes, {compressed} bytes compressed");
    ensure!(compressed <= MAX_COMPRESSED_LEN, "The compressed image has {compressed} bytes.");
    let manifest = &member(&archive, "manifest.json")?[0];
    let tags = manifest["RepoTags"].to_string();
    ensure!(tags.contains(skein_image::REFERENCE), "The image has the tags {tags}.");
    let config = member(&archive, manifest["Config"].as_str().context("no configuration")?)?;
    let labels: BTreeMap<String, String> =
        serde_json::from_value(config["config"]["Labels"].clone())?;
    for (label, value) in
        [("title", "Skein"), ("version", env!("CARGO_PKG_VERSION")), ("licenses", "Apache-2.0")]
    {
        let label = format!("org.opencontainers.image.{label}");
        let found = labels.get(&label).map(String::as_str);
        ensure!(found == Some(value), "The label {label} is {found:?} instead of {value}.");
    }
    let program = &config["config"]["Entrypoint"][0];
    ensure!(*program == "/usr/bin/skein-agent", "The entry point is {program}.");
    Ok(())
}

/// Capabilities that containerd gives a container by default.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// Returns a `ctr run` command with the rights, mounts and command of a container of the chart's
/// DaemonSet, in the network of the machine.
fn ctr_run(pod: &Value, name: &str, cgroup: &str) -> Result<String> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let containers = list(&pod["containers"]);
    let container = containers.iter().find(|c| c["name"] == name).context("no such container")?;
    let security = &container["securityContext"];
    ensure!(security["readOnlyRootFilesystem"] == true && security["privileged"] == false);
    let profile = &security["seccompProfile"]["type"];
    ensure!(*profile == "RuntimeDefault", "The seccomp profile of {name} is {profile}.");
    let mut words: Vec<String> = ["--snapshotter=native", "--net-host", "--read-only", "--seccomp"]
        .map(str::to_owned)
        .to_vec();
    words.push(format!("--cgroup=/{cgroup}/{name} --env=SKEIN_NODE_NAME=node-a"));
    words.extend(DEFAULT_CAPABILITIES.map(|name| format!("--cap-drop=CAP_{name}")));
    let add = list(&security["capabilities"]["add"]);
    words.extend(add.iter().map(|name| format!("--cap-add=CAP_{}", text(name))));
    let volumes = list(&pod["volumes"]);
    for mount in list(&container["volumeMounts"]) {
        let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]);
        let volume = volume.with_context(|| format!("no volume for {mount}"))?;
        let host = volume["hostPath"]["path"].as_str().unwrap_or("/run/config");
        let slave = if mount["mountPropagation"] == "HostToContainer" { ":rslave" } else { "" };
        let mode = if mount["readOnly"] == true { "ro" } else { "rw" };
        let to = text(&mount["mountPath"]);
        words.push(format!("--mount=type=bind,src={host},dst={to},options=rbind{slave}:{mode}"));
    }
    words.extend([format!("localhost/{}", skein_image::REFERENCE), name.to_owned()]);
    words.extend(list(&container["command"]).iter().map(text));
    words.extend(list(&container["args"]).iter().map(text));
    Ok(format!("ctr -a /run/containerd.sock -n k8s.io run {}", words.join(" ")))
}

/// Runs both containers of the chart in containerd in separate namespaces, and then adds a pod
/// whose network namespace is created later.
#[test]
fn agent_runs_with_the_rights_and_mounts_of_the_chart() -> Result<()> {
    let archive = skein_image::build()?;
    let directory = tempfile::tempdir()?;
    let shown = directory.path().display();
    let settings = ["cni.binDir=/run/cni/bin", "cni.confDir=/run/cni/net.d"];
    let objects = chart::rendered(&settings)?;
    let pod = &chart::object(&objects, "DaemonSet", "skein")?["spec"]["template"]["spec"];
    let cgroup = format!("skein-e2e-{}-image", std::process::id());
    // The chart's configuration would read records from a cluster, and the MTU from an underlay,
    // which this machine does not have.
    let config = "name = 'node-a'\nnodes = '/etc/skein/nodes.toml'\n\
        pod_cidrs = ['10.9.1.0/24', 'fd09::/64']\n[interface]\nmtu = 1440\n\
        [cni]\nenabled = true\nchain = []\nbin_dir = '/run/cni/bin'\nconf_dir = '/run/cni/net.d'\n";
    fs::write(directory.path().join("agent.toml"), config)?;
    fs::write(directory.path().join("nodes.toml"), "node = []\n")?;
    let containerd = "version = 2\nroot = '/run/root'\nstate = '/run/state'\n\
        disabled_plugins = ['io.containerd.grpc.v1.cri']\n\
        [grpc]\naddress = '/run/containerd.sock'\n";
    fs::write(directory.path().join("containerd.toml"), containerd)?;
    let request = r#"{"cniVersion":"1.0.0","name":"skein","type":"skein-cni"}"#;
    let script = format!(
        "until_is() {{ n=0; until \"$@\"; do n=$((n+1)); [ $n -lt 100 ] || exit 9; sleep 0.1; done; }}
         mount -t tmpfs tmpfs /run
         mount -t tmpfs tmpfs /var/lib
         mount --make-shared /run
         mkdir -p /run/skein /run/netns /run/cni/bin /run/cni/net.d /var/lib/skein
         mkdir /run/config; cp {shown}/*.toml /run/config/
         ip link set lo up
         containerd --config {shown}/containerd.toml > {shown}/containerd.log 2>&1 &
         until_is test -S /run/containerd.sock
         ctr -a /run/containerd.sock -n k8s.io images import --snapshotter native {archive}
         {dataplane} > {shown}/dataplane.log 2>&1 &
         {agent} > {shown}/agent.log 2>&1 &
         until_is test -e /run/cni/net.d/10-skein.conflist
         ip netns add pod
         echo '{request}' | CNI_COMMAND=ADD CNI_CONTAINERID=c CNI_NETNS=/var/run/netns/pod \
             CNI_IFNAME=eth0 CNI_PATH=/run/cni/bin /run/cni/bin/skein-cni
         ip netns exec pod ping -c 1 -W 2 10.9.1.1
         ip netns exec pod ping -c 1 -W 2 fd09::1
         cat /proc/sys/net/ipv4/ip_forward
         nft list table inet skein",
        archive = archive.display(),
        dataplane = ctr_run(pod, "dataplane", &cgroup)?,
        agent = ctr_run(pod, "agent", &cgroup)?,
    );
    let mut machine = Command::new("unshare");
    machine.args(["--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]);
    let ran = process::finish(machine.args(["sh", "-ec", &script]), &[], Duration::from_secs(60));
    cgroup::remove(&cgroup);
    let ran = ran?;
    let log = |name: &str| process::tail(&directory.path().join(name), 20);
    ensure!(
        ran.code == 0,
        "The script failed with code {}: {}{}\nagent: {}\ndata process: {}",
        ran.code,
        ran.stdout,
        ran.stderr,
        log("agent.log"),
        log("dataplane.log")
    );
    ensure!(ran.stdout.contains("10.9.1.2/32"), "The pod has no address: {}", ran.stdout);
    for (log, name) in [(log("agent.log"), "agent"), (log("dataplane.log"), "dataplane")] {
        let is_clean = !log.contains("ERROR") && !log.contains("WARN");
        ensure!(is_clean, "The log of {name} has errors or warnings: {log}");
    }
    Ok(())
}
