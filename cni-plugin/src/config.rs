//! Network configuration of the plugin, which libcni writes to standard input (CNI specification
//! 1.1.0, sections 1 and 3).

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value};
use skein_cni_protocol::excerpt::excerpt;
use skein_cni_protocol::names::check_name;
use skein_cni_protocol::types::{ErrorCode, Version};
use skein_cni_protocol::{AttachmentId, DEFAULT_SOCKET, DEFAULT_SPOOL};

use crate::types::{Dns, PluginError};

/// A checked network configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Version of the configuration and of the result (`cniVersion`).
    pub version: Version,
    /// Name of the network.
    pub name: String,
    /// Path of the agent's CNI socket.
    pub socket: PathBuf,
    /// Directory of the spool.
    pub spool: PathBuf,
    /// Timeout of a request to the agent, 1 s to 65,535 s; 30 s by default (`timeoutSeconds`).
    pub timeout: Duration,
    /// DNS settings, which the plugin copies to the result.
    pub dns: Dns,
    /// Requested addresses (`runtimeConfig.ips`), without prefix lengths.
    pub ips: Vec<IpAddr>,
    /// Value of `prevResult`; `None` if the configuration has none. In an ADD, the result of the
    /// previous plugins in the list. In a CHECK or a DEL, the result of the attachment's last ADD.
    pub prev_result: Option<Value>,
    /// Attachments to keep in a GC; `None` if the configuration does not list them.
    pub valid_attachments: Option<Vec<AttachmentId>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    name: String,
    #[serde(default)]
    socket: Option<PathBuf>,
    #[serde(default)]
    spool: Option<PathBuf>,
    #[serde(default)]
    timeout_seconds: Option<u16>,
    #[serde(default)]
    dns: Option<Dns>,
    #[serde(default)]
    runtime_config: Option<RuntimeConfig>,
    #[serde(default)]
    prev_result: Option<Value>,
    /// `None` if the key is missing. `null` is an empty list: Go serialises a nil slice as `null`.
    #[serde(default, rename = "cni.dev/valid-attachments", deserialize_with = "null_as_empty")]
    valid_attachments: Option<Vec<ValidAttachment>>,
}

#[derive(Deserialize)]
struct RuntimeConfig {
    #[serde(default)]
    ips: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

fn null_as_empty<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<ValidAttachment>>, D::Error> {
    Ok(Some(Option::deserialize(deserializer)?.unwrap_or_default()))
}

/// Returns `cniVersion` of a network configuration. The other fields are not checked, so that an
/// error about them can be reported in the format of this version.
///
/// # Errors
/// `Decoding` if the text is not a JSON object or `cniVersion` is not a string,
/// `IncompatibleVersion` if the version is not supported.
pub fn version(text: &[u8]) -> Result<Version, PluginError> {
    let value: Value = serde_json::from_slice(text).map_err(|error| {
        PluginError::new(ErrorCode::Decoding, "the network configuration is not JSON")
            .with_details(error)
    })?;
    if !value.is_object() {
        return Err(PluginError::new(
            ErrorCode::Decoding,
            "the network configuration is not a JSON object",
        ));
    }
    match value.get("cniVersion") {
        None | Some(Value::Null) => Ok(Version::DEFAULT),
        Some(Value::String(text)) if text.is_empty() => Ok(Version::DEFAULT),
        Some(Value::String(text)) => Version::parse(text).ok_or_else(|| {
            PluginError::new(
                ErrorCode::IncompatibleVersion,
                format!(
                    "cniVersion {} is not supported: use one of {}",
                    excerpt(text),
                    Version::names()
                ),
            )
        }),
        Some(other) => {
            let other = other.to_string();
            let msg = format!("cniVersion is {}, expected a string", excerpt(&other));
            Err(PluginError::new(ErrorCode::Decoding, msg))
        }
    }
}

fn decode<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, PluginError> {
    serde_json::from_slice(text).map_err(undecodable)
}

fn undecodable(error: serde_json::Error) -> PluginError {
    PluginError::new(ErrorCode::Decoding, "the network configuration has an invalid field")
        .with_details(error)
}

impl Config {
    /// Parses and checks a configuration.
    ///
    /// # Errors
    /// An error of [`version`], `Decoding` if a field has a wrong type, `InvalidNetworkConfig` if
    /// the name of the network, the timeout or a requested address is invalid.
    pub fn parse(text: &[u8]) -> Result<Self, PluginError> {
        let version = version(text)?;
        Self::from_document(version, decode(text)?)
    }

    /// Parses a configuration for a DEL. Fields that a DEL does not need are ignored, so that an
    /// invalid value in them does not prevent the deletion of a pod.
    ///
    /// # Errors
    /// An error of [`version`], `Decoding` if `name`, `socket` or `spool` has a wrong type,
    /// `InvalidNetworkConfig` if the name of the network is invalid.
    pub fn parse_for_del(text: &[u8]) -> Result<Self, PluginError> {
        let version = version(text)?;
        let mut document: Map<String, Value> = decode(text)?;
        document.retain(|key, value| match key.as_str() {
            "name" | "socket" | "spool" => true,
            "timeoutSeconds" => matches!(value.as_u64(), Some(1..=65_535)),
            _ => false,
        });
        let document = serde_json::from_value(Value::Object(document)).map_err(undecodable)?;
        Self::from_document(version, document)
    }

    /// Converts a document to the configuration: validates the name, the addresses and the timeout,
    /// and sets the defaults of missing fields.
    fn from_document(version: Version, document: Document) -> Result<Self, PluginError> {
        let invalid = |msg: String| PluginError::new(ErrorCode::InvalidNetworkConfig, msg);
        check_name("name", &document.name).map_err(|error| invalid(error.to_string()))?;
        let asked = document.runtime_config.and_then(|config| config.ips).unwrap_or_default();
        let ips = asked.iter().map(|text| {
            let ip = text.parse().or_else(|_| text.parse::<IpNet>().map(|net| net.addr()));
            ip.map(|ip: IpAddr| ip.to_canonical()).map_err(|_| {
                let text = excerpt(text);
                invalid(format!("runtimeConfig.ips: {text:?} is not an address"))
            })
        });
        let timeout = document.timeout_seconds.unwrap_or(30);
        if timeout == 0 {
            return Err(invalid("timeoutSeconds is 0: use 1 or more".to_owned()));
        }
        let valid = document.valid_attachments.map(|all| {
            let id = |a: ValidAttachment| AttachmentId {
                container_id: a.container_id,
                ifname: a.ifname,
            };
            all.into_iter().map(id).collect()
        });
        Ok(Self {
            version,
            name: document.name,
            socket: document.socket.unwrap_or_else(|| DEFAULT_SOCKET.into()),
            spool: document.spool.unwrap_or_else(|| DEFAULT_SPOOL.into()),
            timeout: Duration::from_secs(timeout.into()),
            dns: document.dns.unwrap_or_default(),
            ips: ips.collect::<Result<_, _>>()?,
            prev_result: document.prev_result.filter(|previous| !previous.is_null()),
            valid_attachments: valid,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn parse(document: Value) -> Result<Config, PluginError> {
        Config::parse(document.to_string().as_bytes())
    }

    #[test]
    fn del_ignores_invalid_fields_that_it_does_not_need() {
        let document = json!({
            "name": "a", "spool": "/p", "timeoutSeconds": 0, "dns": 7, "prevResult": [],
            "runtimeConfig": { "ips": ["x"] },
        });
        let text = document.to_string();
        assert!(Config::parse(text.as_bytes()).is_err());
        let config = Config::parse_for_del(text.as_bytes()).unwrap();
        assert_eq!((config.spool, config.timeout), ("/p".into(), Duration::from_secs(30)));
    }

    #[test]
    fn missing_fields_have_defaults_and_all_fields_are_read() {
        let config = parse(json!({ "name": "skein", "type": "skein-cni" })).unwrap();
        assert_eq!(config.version.name(), "0.2.0");
        assert_eq!(config.socket, PathBuf::from(DEFAULT_SOCKET));
        assert_eq!((config.valid_attachments, config.prev_result), (None, None));
        let config = parse(json!({
            "cniVersion": "1.1.0", "name": "skein", "type": "skein-cni", "ipam": {}, "extra": [1],
            "socket": "/s", "spool": "/p", "timeoutSeconds": 5, "dns": { "nameservers": ["10.0.0.10"] },
            "runtimeConfig": { "ips": ["10.1.0.5/24", "fd00::5"], "portMappings": [] },
            "prevResult": null,
            "cni.dev/valid-attachments": [{ "containerID": "c", "ifname": "eth0" }],
        }));
        let config = config.unwrap();
        assert_eq!(config.ips, ["10.1.0.5".parse::<IpAddr>().unwrap(), "fd00::5".parse().unwrap()]);
        assert_eq!(config.timeout, Duration::from_secs(5));
        assert_eq!(config.valid_attachments.unwrap()[0].container_id, "c");
        assert_eq!(config.prev_result, None);
        assert_eq!(config.dns.nameservers, ["10.0.0.10"]);
    }

    #[test]
    fn requested_mapped_addresses_are_ipv4() {
        let ips = ["::ffff:10.1.0.5", "::ffff:10.1.0.6/120", "fd00::5"];
        let config = parse(json!({ "name": "a", "runtimeConfig": { "ips": ips } })).unwrap();
        let canonical = ["10.1.0.5", "10.1.0.6", "fd00::5"].map(|ip| ip.parse::<IpAddr>().unwrap());
        assert_eq!(config.ips, canonical);
    }

    #[test]
    fn invalid_configuration_has_the_code_of_its_error() {
        let code = |document: Value| parse(document).unwrap_err().code;
        assert_eq!(Config::parse(b"{").unwrap_err().code, 6);
        assert_eq!(Config::parse(b"[]").unwrap_err().code, 6);
        assert_eq!(code(json!({ "cniVersion": 1, "name": "a" })), 6);
        assert_eq!(code(json!({ "cniVersion": "1.2.0", "name": "a" })), 1);
        assert_eq!(code(json!({ "cniVersion": "1.0.0" })), 7);
        assert_eq!(code(json!({ "cniVersion": "1.0.0", "name": "-" })), 7);
        assert_eq!(code(json!({ "name": "a", "socket": 5 })), 6);
        assert_eq!(code(json!({ "name": "a", "timeoutSeconds": 0 })), 7);
        assert_eq!(code(json!({ "name": "a", "runtimeConfig": { "ips": ["x"] } })), 7);
    }

    proptest! {
        #[test]
        fn arbitrary_input_does_not_panic(text in "\\PC*", bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Config::parse(text.as_bytes());
            let _ = Config::parse(&bytes);
        }
    }
}
