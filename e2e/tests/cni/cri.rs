//! Calls of the Container Runtime Interface (kubernetes/cri-api, runtime.v1) that kubelet makes for
//! a pod, over gRPC. Messages contain only the fields that are used here, with the interface's
//! field numbers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use prost::Message;
use skein_lab::containerd::IMAGE;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic_prost::ProstCodec;

/// Maximum time of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Clone, PartialEq, Message)]
struct SandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(uint32, tag = "4")]
    attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
struct PortMapping {
    /// Transport protocol; 0 is TCP.
    #[prost(int32, tag = "1")]
    protocol: i32,
    #[prost(int32, tag = "2")]
    container_port: i32,
    #[prost(int32, tag = "3")]
    host_port: i32,
    #[prost(string, tag = "4")]
    host_ip: String,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxSandbox {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<SandboxMetadata>,
    #[prost(string, tag = "2")]
    hostname: String,
    #[prost(string, tag = "3")]
    log_directory: String,
    #[prost(message, repeated, tag = "5")]
    port_mappings: Vec<PortMapping>,
    #[prost(map = "string, string", tag = "6")]
    labels: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxSandbox>,
}

#[derive(Clone, PartialEq, Message)]
struct RunSandbox {
    #[prost(message, optional, tag = "1")]
    config: Option<SandboxConfig>,
}

/// Request or response that consists of one identifier.
#[derive(Clone, PartialEq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

#[derive(Clone, PartialEq, Message)]
struct PodIp {
    #[prost(string, tag = "1")]
    ip: String,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxNetwork {
    #[prost(string, tag = "1")]
    ip: String,
    #[prost(message, repeated, tag = "2")]
    additional_ips: Vec<PodIp>,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxStatus {
    #[prost(message, optional, tag = "5")]
    network: Option<SandboxNetwork>,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxStatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<SandboxStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint32, tag = "2")]
    attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<Id>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainer {
    #[prost(string, tag = "1")]
    sandbox: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<SandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSync {
    #[prost(string, tag = "1")]
    container: String,
    #[prost(string, repeated, tag = "2")]
    command: Vec<String>,
    /// Maximum time of the command, seconds.
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSyncAnswer {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Condition {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(bool, tag = "2")]
    status: bool,
    #[prost(string, tag = "4")]
    message: String,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<Condition>,
}

#[derive(Clone, PartialEq, Message)]
struct StatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<RuntimeStatus>,
}

/// A connection to a container runtime.
#[derive(Debug)]
pub(crate) struct Cri {
    runtime: Runtime,
    channel: Channel,
    cgroup: String,
}

/// A pod sandbox of the runtime.
#[derive(Debug)]
pub(crate) struct Sandbox {
    config: SandboxConfig,
    /// Identifier of the sandbox, which the runtime passes as `CNI_CONTAINERID`.
    pub(crate) id: String,
}

impl Cri {
    /// Connects to the runtime's socket. The cgroups of containers are created below `cgroup`.
    ///
    /// # Errors
    /// If no runtime listens on the socket.
    pub(crate) fn connect(socket: &Path, cgroup: &str) -> Result<Self> {
        let runtime = Runtime::new()?;
        let socket: PathBuf = socket.to_owned();
        // The connector ignores the address, which the type requires, and always uses the socket.
        let endpoint = Endpoint::from_static("http://localhost").timeout(CALL_TIMEOUT);
        let connect = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        let channel = runtime.block_on(endpoint.connect_with_connector(connect))?;
        Ok(Self { runtime, channel, cgroup: format!("/{cgroup}") })
    }

    fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A>
    where
        Q: Message + Send + Sync + Default + 'static,
        A: Message + Send + Sync + Default + 'static,
    {
        let path = PathAndQuery::try_from(format!("/runtime.v1.RuntimeService/{method}"))?;
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        let answer = self.runtime.block_on(async {
            client.ready().await?;
            let codec = ProstCodec::<Q, A>::default();
            Ok::<_, anyhow::Error>(client.unary(tonic::Request::new(request), path, codec).await?)
        });
        Ok(answer.with_context(|| method)?.into_inner())
    }

    /// Returns whether the runtime's condition NetworkReady is true. kubelet requests it every 5 s.
    ///
    /// # Errors
    /// If the runtime does not answer, or reports no such condition.
    pub(crate) fn network_ready(&self) -> Result<bool> {
        Ok(self.network_problem()?.is_none())
    }

    /// Returns the message of the runtime's condition NetworkReady if it is false; `None` if it is
    /// true.
    ///
    /// # Errors
    /// If the runtime does not answer, or reports no such condition.
    pub(crate) fn network_problem(&self) -> Result<Option<String>> {
        let answer: StatusAnswer = self.call("Status", Nothing {})?;
        let conditions = answer.status.unwrap_or_default().conditions;
        let network = conditions.into_iter().find(|c| c.kind == "NetworkReady");
        let network = network.context("the runtime reports no condition NetworkReady")?;
        Ok((!network.status).then_some(network.message))
    }

    /// Starts a pod. `ports` are pairs of a TCP port of the node and the port of the pod to which
    /// it is mapped.
    ///
    /// # Errors
    /// If the runtime fails, for example because the CNI plugin fails.
    pub(crate) fn run(&self, name: &str, ports: &[(u16, u16)]) -> Result<Sandbox> {
        let mapping = |&(host, container): &(u16, u16)| PortMapping {
            protocol: 0,
            container_port: container.into(),
            host_port: host.into(),
            host_ip: String::new(),
        };
        let config = SandboxConfig {
            metadata: Some(SandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            port_mappings: ports.iter().map(mapping).collect(),
            linux: Some(LinuxSandbox { cgroup_parent: self.cgroup.clone() }),
            ..SandboxConfig::default()
        };
        let answer: Id = self.call("RunPodSandbox", RunSandbox { config: Some(config.clone()) })?;
        Ok(Sandbox { config, id: answer.id })
    }

    /// Returns the pod's addresses, the primary one first.
    ///
    /// # Errors
    /// If the runtime fails or reports no network.
    pub(crate) fn addresses(&self, sandbox: &Sandbox) -> Result<Vec<std::net::IpAddr>> {
        let answer: SandboxStatusAnswer =
            self.call("PodSandboxStatus", Id { id: sandbox.id.clone() })?;
        let network = answer.status.and_then(|status| status.network).context("no network")?;
        let more = network.additional_ips.into_iter().map(|ip| ip.ip);
        let all = std::iter::once(network.ip).chain(more);
        all.map(|ip| ip.parse().with_context(|| format!("address {ip:?}"))).collect()
    }

    /// Starts a container in the pod and returns its identifier.
    ///
    /// # Errors
    /// If the runtime fails.
    pub(crate) fn container(
        &self,
        sandbox: &Sandbox,
        name: &str,
        command: &[&str],
    ) -> Result<String> {
        let request = CreateContainer {
            sandbox: sandbox.id.clone(),
            config: Some(ContainerConfig {
                metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
                image: Some(Id { id: IMAGE.to_owned() }),
                command: command.iter().map(|&word| word.to_owned()).collect(),
            }),
            sandbox_config: Some(sandbox.config.clone()),
        };
        let created: Id = self.call("CreateContainer", request)?;
        let _: Nothing = self.call("StartContainer", created.clone())?;
        Ok(created.id)
    }

    /// Runs a command in a container and returns its exit code and output.
    ///
    /// # Errors
    /// If the runtime fails, or if the command does not exit within 20 s.
    pub(crate) fn exec(&self, container: &str, command: &[&str]) -> Result<(i32, String)> {
        let request = ExecSync {
            container: container.to_owned(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 20,
        };
        let answer: ExecSyncAnswer = self.call("ExecSync", request)?;
        let text = [answer.stdout, answer.stderr].concat();
        Ok((answer.exit_code, String::from_utf8_lossy(&text).into_owned()))
    }

    /// Stops and removes a pod with its containers.
    ///
    /// # Errors
    /// If the runtime fails, for example because the CNI plugin fails.
    pub(crate) fn remove(&self, sandbox: &Sandbox) -> Result<()> {
        let id = Id { id: sandbox.id.clone() };
        let _: Nothing = self.call("StopPodSandbox", id.clone())?;
        let _: Nothing = self.call("RemovePodSandbox", id)?;
        Ok(())
    }
}
