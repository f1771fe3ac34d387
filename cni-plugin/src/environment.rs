//! Environment variables of the plugin (CNI specification 1.1.0, section 2).

use std::path::PathBuf;

use skein_cni_protocol::excerpt::excerpt;
use skein_cni_protocol::names::check_id;
use skein_cni_protocol::types::ErrorCode;
use skein_cni_protocol::{AttachmentId, Pod};

use crate::types::PluginError;

/// An operation of the CNI specification (`CNI_COMMAND`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Attaches a container.
    Add,
    /// Detaches a container.
    Del,
    /// Compares an attachment with the result of its ADD.
    Check,
    /// Removes stale attachments.
    Gc,
    /// Reports whether the plugin can serve an ADD.
    Status,
    /// Prints the supported versions.
    Version,
}

impl Operation {
    /// Returns the value of `CNI_COMMAND` for the operation.
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

/// The variables of one call, checked for its operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// Operation (`CNI_COMMAND`).
    pub operation: Operation,
    /// Attachment (`CNI_CONTAINERID`, `CNI_IFNAME`); both strings are empty if the variables are
    /// not set.
    pub id: AttachmentId,
    /// Path of the network namespace (`CNI_NETNS`); `Some` for ADD and CHECK,
    /// optional for other operations.
    pub netns: Option<PathBuf>,
    /// True if `netns` may be the plugin's own network namespace (`CNI_NETNS_OVERRIDE`).
    pub netns_override: bool,
    /// Pod of `CNI_ARGS`; only for ADD and CHECK.
    pub pod: Option<Pod>,
}

impl Environment {
    /// Reads the variables by `get` and checks them. Returns `None` if `CNI_COMMAND` is missing or
    /// empty.
    ///
    /// # Errors
    /// `InvalidEnvironment` if the operation is unknown, if a variable that the operation requires
    /// is missing, or if a variable is invalid.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, PluginError> {
        let given = |name: &str| get(name).filter(|value| !value.is_empty());
        let Some(command) = given("CNI_COMMAND") else { return Ok(None) };
        let (operation, needed): (_, &[&str]) = match command.as_str() {
            // The specification requires CNI_PATH only for GC.
            "ADD" => (Operation::Add, &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
            "CHECK" => (Operation::Check, &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
            "DEL" => (Operation::Del, &["CNI_CONTAINERID", "CNI_IFNAME"]),
            "GC" => (Operation::Gc, &["CNI_PATH"]),
            "STATUS" => (Operation::Status, &[]),
            "VERSION" => (Operation::Version, &[]),
            other => {
                let other = excerpt(other);
                return Err(invalid_environment(format!(
                    "CNI_COMMAND is {other:?}, expected ADD, DEL, CHECK, GC, STATUS or VERSION"
                )));
            }
        };
        let missing: Vec<&str> =
            needed.iter().copied().filter(|name| given(name).is_none()).collect();
        if !missing.is_empty() {
            return Err(invalid_environment(format!("{command} requires {}", missing.join(", "))));
        }
        let id = AttachmentId {
            container_id: given("CNI_CONTAINERID").unwrap_or_default(),
            ifname: given("CNI_IFNAME").unwrap_or_default(),
        };
        if needed.contains(&"CNI_CONTAINERID") {
            check_id(&id)?;
        }
        let pod = match operation {
            // Other operations do not use CNI_ARGS, so that an invalid value must not fail them.
            Operation::Add | Operation::Check => arguments(&given("CNI_ARGS").unwrap_or_default())?,
            _ => None,
        };
        Ok(Some(Self {
            operation,
            id,
            netns: given("CNI_NETNS").map(PathBuf::from),
            netns_override: matches!(
                given("CNI_NETNS_OVERRIDE").as_deref(),
                Some("1" | "t" | "T" | "true" | "TRUE" | "True")
            ),
            pod,
        }))
    }
}

/// Parses `CNI_ARGS`: pairs `KEY=VALUE`, separated by semicolons. An unknown key is an error unless
/// `IgnoreUnknown` is true, as in the reference plugins.
fn arguments(text: &str) -> Result<Option<Pod>, PluginError> {
    let (mut pod, mut unknown, mut ignore, mut any) = (Pod::default(), Vec::new(), false, false);
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            let pair = excerpt(pair);
            return Err(invalid_environment(format!("CNI_ARGS: {pair:?} is not KEY=VALUE")));
        };
        match key {
            "IgnoreUnknown" => {
                ignore = match value {
                    "1" | "true" | "True" | "TRUE" | "t" | "T" => true,
                    "0" | "false" | "False" | "FALSE" | "f" | "F" => false,
                    _ => {
                        let value = excerpt(value);
                        return Err(invalid_environment(format!(
                            "CNI_ARGS: IgnoreUnknown is {value:?}: use 1 or 0"
                        )));
                    }
                }
            }
            "K8S_POD_NAMESPACE" => (pod.namespace, any) = (value.to_owned(), true),
            "K8S_POD_NAME" => (pod.name, any) = (value.to_owned(), true),
            "K8S_POD_UID" => pod.uid = Some(value.to_owned()),
            "K8S_POD_INFRA_CONTAINER_ID" => {}
            other => unknown.push(other),
        }
    }
    if !unknown.is_empty() && !ignore {
        return Err(invalid_environment(format!(
            "CNI_ARGS has unknown keys: {}. Add IgnoreUnknown=1 to ignore them.",
            excerpt(&unknown.join(", "))
        )));
    }
    Ok(any.then_some(pod))
}

fn invalid_environment(msg: String) -> PluginError {
    PluginError::new(ErrorCode::InvalidEnvironment, msg)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ADD: [(&str, &str); 5] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
    ];

    fn read(changes: &[(&str, &str)]) -> Result<Option<Environment>, PluginError> {
        let changed = |name: &str| changes.iter().find(|(key, _)| *key == name);
        let usual = |name: &str| ADD.iter().find(|(key, _)| *key == name);
        Environment::read(|name| {
            changed(name).or_else(|| usual(name)).map(|(_, value)| (*value).to_owned())
        })
    }

    fn refused(changes: &[(&str, &str)]) -> String {
        let error = read(changes).unwrap_err();
        assert_eq!(error.code, 4);
        error.msg
    }

    #[test]
    fn error_names_every_missing_variable() {
        assert_eq!(read(&[("CNI_COMMAND", "")]), Ok(None));
        let all =
            [("CNI_CONTAINERID", ""), ("CNI_NETNS", ""), ("CNI_IFNAME", ""), ("CNI_PATH", "")];
        let add = refused(&all);
        assert_eq!(add, "ADD requires CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME");
        let with = |operation| [&all[..], &[("CNI_COMMAND", operation)]].concat();
        assert_eq!(refused(&with("DEL")), "DEL requires CNI_CONTAINERID, CNI_IFNAME");
        assert_eq!(refused(&with("GC")), "GC requires CNI_PATH");
        assert_eq!(read(&with("VERSION")).unwrap().unwrap().operation, Operation::Version);
        assert!(refused(&[("CNI_COMMAND", "FROB")]).contains("FROB"));
        let without = read(&[("CNI_COMMAND", "DEL"), ("CNI_NETNS", "")]).unwrap().unwrap();
        assert_eq!(without.netns, None);
    }

    #[test]
    fn cni_path_is_required_for_gc_only() {
        for operation in ["ADD", "DEL", "CHECK", "STATUS", "VERSION"] {
            let environment = read(&[("CNI_COMMAND", operation), ("CNI_PATH", "")]);
            assert!(environment.is_ok(), "{operation} fails without CNI_PATH: {environment:?}");
        }
        assert_eq!(refused(&[("CNI_COMMAND", "GC"), ("CNI_PATH", "")]), "GC requires CNI_PATH");
    }

    #[test]
    fn invalid_names_are_refused() {
        for id in ["-x", "a/b", "a b", "a\n", "ä", ".a"] {
            assert!(refused(&[("CNI_CONTAINERID", id)]).contains("CNI_CONTAINERID"), "{id}");
        }
        for name in [".", "..", "a/b", "a:b", "a b", "a\tb", "sixteen-bytes-xx"] {
            assert!(refused(&[("CNI_IFNAME", name)]).contains("CNI_IFNAME"), "{name}");
        }
        assert!(
            read(&[("CNI_CONTAINERID", "0a.B_c-9"), ("CNI_IFNAME", "fifteen-bytes-x")]).is_ok()
        );
    }

    #[test]
    fn cni_args_are_parsed_to_the_pod() {
        let text = "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;\
                    K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u;OTHER=x=y";
        let pod = read(&[("CNI_ARGS", text)]).unwrap().unwrap().pod.unwrap();
        assert_eq!((pod.namespace.as_str(), pod.name.as_str()), ("ns", "web-0"));
        assert_eq!(pod.uid.as_deref(), Some("u"));
        assert!(refused(&[("CNI_ARGS", "FOO=1")]).contains("FOO"));
        assert!(refused(&[("CNI_ARGS", "FOO")]).contains("KEY=VALUE"));
        assert!(refused(&[("CNI_ARGS", "IgnoreUnknown=maybe")]).contains("maybe"));
        assert_eq!(read(&[("CNI_ARGS", "IgnoreUnknown=true;A=1")]).unwrap().unwrap().pod, None);
    }

    proptest! {
        #[test]
        fn arbitrary_variables_do_not_panic(name in "\\PC*", value in "\\PC*", text in "[A-Za-z=;0-9]*") {
            let _ = read(&[("CNI_CONTAINERID", &name), ("CNI_IFNAME", &value)]);
            let _ = read(&[("CNI_ARGS", &value)]);
            let _ = read(&[("CNI_ARGS", &text)]);
        }
    }
}
