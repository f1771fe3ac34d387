//! Call of the plugin: converts environment and standard input to a request to the agent, and
//! the response to a document on standard output.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Value, json};
use skein_cni_protocol::address::canonical_net;
use skein_cni_protocol::excerpt::{excerpt, message_excerpt};
use skein_cni_protocol::frame::FrameError;
use skein_cni_protocol::types::{ErrorCode, Version};
use skein_cni_protocol::{
    Add, Check, CniError, Command, Del, Gc, MAX_FRAME, Request, Response, VERSION, spool,
};

use crate::config::{self, Config};
use crate::environment::{Environment, Operation};
use crate::types::PluginError;
use crate::{client, result};

/// Error code of Skein: the agent does not respond, or its response is invalid.
const AGENT_UNAVAILABLE: u32 = 101;
/// Maximum time that DEL waits for the agent before the request goes to the spool, so that an agent
/// that does not respond delays the deletion of pods only briefly.
const DEL_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time that STATUS waits for the agent. A runtime calls STATUS while kubelet waits for the
/// runtime's state, and kubelet stops synchronising pods after 30 s without that state.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);
/// Magic number of nsfs, the file system of namespaces (linux/magic.h).
const NSFS: rustix::fs::FsWord = 0x6e73_6673;

/// Executes the operation of `CNI_COMMAND` and prints its result or its error document. Without
/// `CNI_COMMAND`, prints a description of the plugin on standard error. Returns the exit code, 0 or
/// 1.
pub fn main() -> ExitCode {
    let mut input = Vec::new();
    let read = |input: &mut Vec<u8>| io::stdin().take(MAX_FRAME as u64 + 1).read_to_end(input);
    let get = |name: &str| std::env::var(name).ok();
    let environment = match Environment::read(get) {
        Ok(Some(environment)) => environment,
        Ok(None) => {
            eprintln!(
                "skein-cni {}: the CNI plugin of Skein, an encrypted overlay network for Kubernetes.\n\
                 A container runtime starts it; see the CNI specification. Versions: {}.",
                env!("CARGO_PKG_VERSION"),
                Version::names()
            );
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            // The error document has the version of the configuration if that can be read.
            let _ = read(&mut input);
            return print_outcome(Err(error), config::version(&input).unwrap_or(Version::NEWEST));
        }
    };
    if environment.operation == Operation::Version {
        let _ = read(&mut input);
        return print_outcome(Ok(Some(versions())), Version::NEWEST);
    }
    let version = match read(&mut input) {
        Ok(length) if length > MAX_FRAME => {
            let msg = format!("the network configuration is longer than {MAX_FRAME} bytes");
            return print_outcome(Err(PluginError::new(ErrorCode::Io, msg)), Version::NEWEST);
        }
        Ok(_) => config::version(&input),
        Err(error) => {
            let msg = "cannot read the network configuration";
            let error = PluginError::new(ErrorCode::Io, msg).with_details(error);
            return print_outcome(Err(error), Version::NEWEST);
        }
    };
    let parsed = match environment.operation {
        Operation::Del => Config::parse_for_del(&input),
        _ => Config::parse(&input),
    };
    let outcome = parsed.and_then(|config| run(environment, config));
    print_outcome(outcome, version.unwrap_or(Version::NEWEST))
}

/// Prints a result or an error document on standard output and returns the exit code.
fn print_outcome(outcome: Result<Option<Value>, PluginError>, version: Version) -> ExitCode {
    let (document, code) = match outcome {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(document)) => (document, ExitCode::SUCCESS),
        Err(error) => {
            let mut document =
                json!({ "cniVersion": version.name(), "code": error.code, "msg": error.msg });
            if !error.details.is_empty() {
                document["details"] = error.details.into();
            }
            (document, ExitCode::FAILURE)
        }
    };
    match writeln!(io::stdout(), "{document}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn versions() -> Value {
    json!({
        "cniVersion": Version::NEWEST.name(),
        "supportedVersions": Version::ALL.map(Version::name),
    })
}

fn run(environment: Environment, config: Config) -> Result<Option<Value>, PluginError> {
    let required = match environment.operation {
        Operation::Check => Version::V0_4_0,
        Operation::Gc | Operation::Status => Version::V1_1_0,
        Operation::Add | Operation::Del | Operation::Version => Version::ALL[0],
    };
    if config.version < required {
        return Err(PluginError::new(
            ErrorCode::IncompatibleVersion,
            format!(
                "{} requires cniVersion {} or later",
                environment.operation.name(),
                required.name()
            ),
        ));
    }
    match environment.operation {
        Operation::Add => add(environment, config).map(Some),
        Operation::Del => del(&environment, &config).map(|()| None),
        Operation::Check => check(&environment, &config).map(|()| None),
        Operation::Gc => gc(config).map(|()| None),
        Operation::Status => status(&config).map(|()| None),
        Operation::Version => Ok(Some(versions())),
    }
}

fn add(environment: Environment, config: Config) -> Result<Value, PluginError> {
    // An invalid prevResult must fail before the agent attaches the container.
    result::check_previous(config.prev_result.as_ref())?;
    let path = environment.netns.clone().unwrap_or_default();
    let netns = open_netns(&path, environment.netns_override)?;
    let sandbox = path.to_string_lossy().into_owned();
    let command = Command::Add(Add {
        id: environment.id,
        network: config.name.clone(),
        netns: path,
        pod: environment.pod,
        ips: config.ips.clone(),
    });
    let limit = config.timeout;
    match send_request(&config, command, Some(netns.as_fd()), limit) {
        Ok(Response::Attached(attached)) => {
            result::document(config.version, &attached, &sandbox, &config.dns, config.prev_result)
        }
        Ok(other) => Err(response_error(other)),
        Err(error) => {
            Err(agent_unavailable(ErrorCode::TryAgainLater as u32, &config, &error, limit))
        }
    }
}

fn del(environment: &Environment, config: &Config) -> Result<(), PluginError> {
    let id = &environment.id;
    if let Some(path) = &environment.netns {
        refuse_own_namespace(path, environment.netns_override)?;
    }
    let command = Command::Del(Del { id: id.clone() });
    let limit = config.timeout.min(DEL_TIMEOUT);
    match send_request(config, command, None, limit) {
        Ok(Response::Done) => Ok(()),
        // During an upgrade, plugin and agent have different versions for a short time.
        Ok(Response::Refused(refusal)) if refusal.code == ErrorCode::IncompatibleVersion as u32 => {
            spool::put(&config.spool, id)
                .map_err(|failed| response_error(Response::Refused(refusal)).with_details(failed))
        }
        Ok(other) => Err(response_error(other)),
        Err(error) => spool::put(&config.spool, id).map_err(|failed| {
            let spool = config.spool.display();
            agent_unavailable(AGENT_UNAVAILABLE, config, &error, limit)
                .with_details(format!("the request cannot be stored in {spool} either: {failed}"))
        }),
    }
}

fn check(environment: &Environment, config: &Config) -> Result<(), PluginError> {
    let Some(previous) = &config.prev_result else {
        return Err(PluginError::new(ErrorCode::InvalidNetworkConfig, "CHECK requires prevResult"));
    };
    let ips = own_addresses(previous, &environment.id.ifname)?;
    let path = environment.netns.clone().unwrap_or_default();
    let netns = open_netns(&path, environment.netns_override)?;
    let command = Command::Check(Check { id: environment.id.clone(), ips });
    match send_request(config, command, Some(netns.as_fd()), config.timeout) {
        Ok(Response::Done) => Ok(()),
        Ok(other) => Err(response_error(other)),
        Err(error) => Err(agent_unavailable(AGENT_UNAVAILABLE, config, &error, config.timeout)),
    }
}

/// Returns the addresses of the interface `ifname` in the container from a previous result.
/// Addresses of other interfaces belong to other plugins.
fn own_addresses(previous: &Value, ifname: &str) -> Result<Vec<IpNet>, PluginError> {
    let wrong = |what: &str| PluginError::new(ErrorCode::Decoding, format!("prevResult: {what}"));
    let list = |key: &str| previous[key].as_array().map(Vec::as_slice).unwrap_or_default();
    let inside = |interface: &&Value| {
        interface["name"] == ifname && interface["sandbox"].as_str().is_some_and(|s| !s.is_empty())
    };
    let Some(index) = list("interfaces").iter().position(|interface| inside(&interface)) else {
        return Err(PluginError::new(
            ErrorCode::InvalidNetworkConfig,
            format!("prevResult has no interface {ifname} in the container"),
        ));
    };
    let ours = list("ips").iter().filter(|ip| ip["interface"].as_u64() == Some(index as u64));
    ours.map(|ip| {
        let text = ip["address"].as_str().ok_or_else(|| wrong("an ip without an address"))?;
        text.parse().map(canonical_net).map_err(|_| {
            wrong(&format!("{:?} is not an address with a prefix length", excerpt(text)))
        })
    })
    .collect()
}

fn gc(config: Config) -> Result<(), PluginError> {
    let Some(valid) = config.valid_attachments.clone() else {
        // A missing list must not be treated as an empty list, which would remove every attachment.
        return Err(PluginError::new(
            ErrorCode::InvalidNetworkConfig,
            "GC requires cni.dev/valid-attachments",
        ));
    };
    let command = Command::Gc(Gc { network: config.name.clone(), valid });
    match send_request(&config, command, None, config.timeout) {
        Ok(Response::Done) => Ok(()),
        Ok(other) => Err(response_error(other)),
        Err(error) => Err(agent_unavailable(AGENT_UNAVAILABLE, &config, &error, config.timeout)),
    }
}

fn status(config: &Config) -> Result<(), PluginError> {
    let limit = config.timeout.min(STATUS_TIMEOUT);
    match send_request(config, Command::Status, None, limit) {
        Ok(Response::Done) => Ok(()),
        Ok(other) => Err(response_error(other)),
        Err(error) => Err(agent_unavailable(ErrorCode::NotAvailable as u32, config, &error, limit)),
    }
}

fn send_request(
    config: &Config,
    command: Command,
    netns: Option<BorrowedFd<'_>>,
    limit: Duration,
) -> Result<Response, FrameError> {
    client::send_request(&config.socket, &Request { protocol: VERSION, command }, netns, limit)
}

/// Returns the error of a response that is not the success of the request: the error with which the
/// agent refused it, or the error of a response that belongs to another operation.
fn response_error(answer: Response) -> PluginError {
    match answer {
        Response::Refused(CniError { code, msg, details }) => PluginError { code, msg, details },
        other => PluginError {
            code: AGENT_UNAVAILABLE,
            msg: "the agent sent a response of another operation. Check that the plugin and the \
                  agent have the same version."
                .to_owned(),
            details: message_excerpt(&format!("{other:?}")).into_owned(),
        },
    }
}

/// Returns the error of a request that got no valid response within `limit`.
fn agent_unavailable(
    code: u32,
    config: &Config,
    error: &FrameError,
    limit: Duration,
) -> PluginError {
    let (socket, seconds) = (config.socket.display(), limit.as_secs());
    // A socket timeout (SO_RCVTIMEO, SO_SNDTIMEO) is EAGAIN, which std maps to `WouldBlock`.
    let late = matches!(error, FrameError::Io(error) if error.kind() == io::ErrorKind::WouldBlock);
    let msg = match late {
        true => format!(
            "the Skein agent did not answer within {seconds} s on {socket}: see its log on this node"
        ),
        false => {
            format!("the Skein agent does not answer on {socket}: is it running on this node?")
        }
    };
    PluginError { code, msg, details: message_excerpt(&error.to_string()).into_owned() }
}

fn open_netns(path: &Path, allow_own: bool) -> Result<File, PluginError> {
    let shown = path.display();
    let failed = |error: io::Error| {
        PluginError::new(ErrorCode::UnknownContainer, format!("cannot open CNI_NETNS {shown}"))
            .with_details(error)
    };
    let file = File::open(path).map_err(failed)?;
    let kind = rustix::fs::fstatfs(&file).map_err(|error| failed(error.into()))?;
    if kind.f_type != NSFS {
        let msg = format!("CNI_NETNS {shown} is not a network namespace");
        return Err(PluginError::new(ErrorCode::UnknownContainer, msg));
    }
    refuse_own_namespace(path, allow_own)?;
    Ok(file)
}

/// Refuses the plugin's own network namespace, which is the node's, unless `allow_own` is true
/// (`CNI_NETNS_OVERRIDE`). A pod in it would use the network of the node.
fn refuse_own_namespace(path: &Path, allow_own: bool) -> Result<(), PluginError> {
    let identity = |path: &Path| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.dev(), found.ino()))
    };
    let own = identity(Path::new("/proc/self/ns/net"));
    if allow_own || own.is_none() || identity(path) != own {
        return Ok(());
    }
    Err(PluginError::new(
        ErrorCode::InvalidNetns,
        format!("CNI_NETNS {} is the node's own network namespace", path.display()),
    ))
}
