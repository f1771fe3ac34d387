//! Keys of the configuration file, and their conversion to a valid [`Config`].

use std::path::{Path, PathBuf};

use serde::Deserialize;
use skein_ipc::OffloadSettings;

use super::parse::cidrs;
use super::policy::PolicyKeys;
use super::underlay::{Underlay, UnderlayKeys};
use super::{
    Cni, Config, Control, Dataplane, Firewall, Interface, Invalid, KeyRotation, Kubernetes,
    Metrics, StatusPage, check_inside, check_node_name, check_outside,
};
use crate::logging::{self, Log};

/// Maximum length of a unix socket's path in bytes: `sun_path` (unix(7)) without its terminator.
const MAX_SOCKET_PATH: usize = 107;

/// The keys of the configuration file as they were read, before [`File::validate`]. Missing keys
/// have their default values.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    name: Option<String>,
    cluster_id: String,
    state_dir: PathBuf,
    private_key_file: Option<PathBuf>,
    key_rotation: KeyRotation,
    nodes: Option<PathBuf>,
    pod_cidrs: Option<Vec<String>>,
    cluster_cidrs: Vec<String>,
    interface: Interface,
    underlay: UnderlayKeys,
    dataplane: Dataplane,
    offload: OffloadSettings,
    metrics: Metrics,
    status_page: StatusPage,
    control: Control,
    cni: Cni,
    firewall: Firewall,
    policy: PolicyKeys,
    kubernetes: Kubernetes,
    log: Log,
}

impl Default for File {
    fn default() -> Self {
        Self {
            name: None,
            cluster_id: "default".to_owned(),
            state_dir: "/var/lib/skein".into(),
            private_key_file: None,
            key_rotation: KeyRotation::default(),
            nodes: None,
            pod_cidrs: None,
            cluster_cidrs: Vec::new(),
            interface: Interface::default(),
            underlay: UnderlayKeys::default(),
            dataplane: Dataplane::default(),
            offload: OffloadSettings::ALL,
            metrics: Metrics::default(),
            status_page: StatusPage::default(),
            control: Control::default(),
            cni: Cni::default(),
            firewall: Firewall::default(),
            policy: PolicyKeys::default(),
            kubernetes: Kubernetes::default(),
            log: Log::default(),
        }
    }
}

impl File {
    /// Validates all values and converts them. First validates each table of the file alone, and
    /// then the values that must agree with values of another table.
    pub(super) fn validate(mut self) -> Result<Config, Invalid> {
        let name = match self.name.take() {
            Some(name) => name,
            None => host_name()?,
        };
        check_node_name(&name)?;
        if self.cluster_id.is_empty() || self.cluster_id.len() > 200 {
            return Err(Invalid("cluster_id: use 1 to 200 bytes".to_owned()));
        }
        let pod_cidrs =
            self.pod_cidrs.take().map(|texts| cidrs("pod_cidrs", &texts)).transpose()?;
        if pod_cidrs.as_ref().is_some_and(Vec::is_empty) {
            return Err(Invalid(
                "pod_cidrs is empty. Set a prefix, or remove the key to use the node's record."
                    .to_owned(),
            ));
        }
        let cluster_cidrs = cidrs("cluster_cidrs", &self.cluster_cidrs)?;
        check_inside(pod_cidrs.as_deref().unwrap_or_default(), &cluster_cidrs)
            .map_err(|error| Invalid(format!("pod_cidrs: {error}")))?;
        self.interface.check(pod_cidrs.as_deref())?;
        self.cni.set_defaults(&self.interface.name);
        self.check_paths()?;
        self.check_sockets()?;
        self.check_tables()?;
        let Underlay { settings: underlay, notes } = Underlay::try_from(self.underlay)?;
        check_outside(underlay.addresses.iter().copied(), &cluster_cidrs)
            .map_err(|error| Invalid(format!("underlay.addresses: {error}")))?;
        let policy = self.policy.validate(self.cni.enabled, self.kubernetes.enabled)?;
        Ok(Config {
            name,
            cluster_id: self.cluster_id,
            state_dir: self.state_dir,
            private_key_file: self.private_key_file,
            key_rotation: self.key_rotation,
            nodes: self.nodes.unwrap_or_else(|| "/etc/skein/nodes.d".into()),
            pod_cidrs,
            cluster_cidrs,
            interface: self.interface,
            underlay,
            dataplane: self.dataplane,
            offload: self.offload,
            metrics: self.metrics,
            status_page: self.status_page,
            control: self.control,
            cni: self.cni,
            firewall: self.firewall,
            policy,
            kubernetes: self.kubernetes,
            log: self.log,
            notes,
        })
    }

    fn check_paths(&self) -> Result<(), Invalid> {
        let paths: [(&str, Option<&Path>); 7] = [
            ("state_dir", Some(&self.state_dir)),
            ("private_key_file", self.private_key_file.as_deref()),
            ("nodes", self.nodes.as_deref()),
            ("dataplane.socket", Some(&self.dataplane.socket)),
            ("control.socket", Some(&self.control.socket)),
            ("cni.socket", Some(&self.cni.socket)),
            ("cni.spool", Some(&self.cni.spool)),
        ];
        for (key, path) in paths {
            if path.is_some_and(|path| path.as_os_str().is_empty()) {
                return Err(Invalid(format!("{key} is empty. Set a path, or leave the key out.")));
            }
        }
        Ok(())
    }

    fn check_sockets(&self) -> Result<(), Invalid> {
        let sockets = [
            ("dataplane.socket", &self.dataplane.socket),
            ("control.socket", &self.control.socket),
            ("cni.socket", &self.cni.socket),
        ];
        for (index, (key, path)) in sockets.iter().enumerate() {
            let length = path.as_os_str().len();
            if length > MAX_SOCKET_PATH {
                return Err(Invalid(format!(
                    "{key} has {length} bytes, but the path of a socket has at most {MAX_SOCKET_PATH}"
                )));
            }
            if let Some((other, _)) = sockets[..index].iter().find(|(_, used)| used == path) {
                return Err(Invalid(format!(
                    "{other} and {key} are both {}. Give each socket its own path.",
                    path.display()
                )));
            }
        }
        Ok(())
    }

    /// Checks the tables that depend on no other table or only on `[kubernetes]`.
    fn check_tables(&self) -> Result<(), Invalid> {
        self.kubernetes.check()?;
        let in_kubernetes = self.kubernetes.enabled;
        if in_kubernetes && self.nodes.is_some() {
            return Err(Invalid(
                "nodes: with kubernetes.enabled, the node records are SkeinNodes. Leave nodes out."
                    .to_owned(),
            ));
        }
        self.key_rotation.check(in_kubernetes)?;
        self.dataplane.check()?;
        self.metrics.check()?;
        self.cni.check()?;
        logging::parse(&self.log.level).map_err(|error| Invalid(format!("log.level = {error}")))?;
        Ok(())
    }
}

fn host_name() -> Result<String, Invalid> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_err(|error| Invalid(format!("name: cannot read the host name: {error}. Set name.")))?;
    Ok(name.trim().to_owned())
}
