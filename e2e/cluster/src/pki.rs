//! Keys of a cluster: one certificate authority, certificates of its programs, and kubeconfigs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use skein_lab::process;

/// Configuration of OpenSSL. With its default configuration, OpenSSL would mark every certificate
/// as the certificate of an authority.
const SETTINGS: &str = "[req]\ndistinguished_name = name\n[name]\n";

/// A directory with the keys and certificates of a cluster.
#[derive(Debug, Clone)]
pub(super) struct Pki {
    directory: PathBuf,
    /// URL of the API server.
    server: String,
}

impl Pki {
    /// Creates the authority and the key that signs the tokens of service accounts.
    ///
    /// # Errors
    /// If a file cannot be written, or if `openssl` fails.
    pub(super) fn create(directory: PathBuf, server: &str) -> Result<Self> {
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("openssl.cnf"), SETTINGS)?;
        let pki = Self { directory, server: server.to_owned() };
        let usage = "keyUsage=critical,keyCertSign,digitalSignature";
        let mut command = pki.openssl("ca", "/CN=laboratory");
        command.args(["-addext", "basicConstraints=critical,CA:true", "-addext", usage]);
        process::run(&mut command)?;
        let mut command = Command::new("openssl");
        // The API server of Kubernetes 1.20 derives the public key only from this format (SEC 1).
        command.args(["ecparam", "-name", "prime256v1", "-genkey", "-noout"]);
        process::run(command.arg("-out").arg(pki.path("service-accounts.key")))?;
        Ok(pki)
    }

    /// Returns a command that creates a key and its certificate.
    fn openssl(&self, name: &str, subject: &str) -> Command {
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-new", "-nodes", "-days", "3650", "-newkey", "ec"]);
        command.args(["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", subject]);
        command.arg("-config").arg(self.path("openssl.cnf"));
        command.arg("-keyout").arg(self.path(&format!("{name}.key")));
        command.arg("-out").arg(self.path(&format!("{name}.crt")));
        command
    }

    /// Returns the path of a file in the directory.
    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.directory.join(file)
    }

    /// Returns the path of a file in the directory as text, for arguments.
    pub(super) fn text(&self, file: &str) -> String {
        self.path(file).to_string_lossy().into_owned()
    }

    /// Creates `NAME.key` and `NAME.crt` for a client and a server. `subject` has the form
    /// `/O=system:masters/CN=admin`, `names` the form `DNS:node1,IP:192.0.2.1`.
    ///
    /// # Errors
    /// If `openssl` fails.
    pub(super) fn certify(&self, name: &str, subject: &str, names: Option<&str>) -> Result<()> {
        let mut command = self.openssl(name, subject);
        command.arg("-CA").arg(self.path("ca.crt")).arg("-CAkey").arg(self.path("ca.key"));
        command.args(["-addext", "keyUsage=critical,digitalSignature"]);
        command.args(["-addext", "extendedKeyUsage=clientAuth,serverAuth"]);
        if let Some(names) = names {
            command.arg("-addext").arg(format!("subjectAltName={names}"));
        }
        process::run(&mut command).with_context(|| format!("cannot certify {name}")).map(drop)
    }

    /// Creates `NAME.kubeconfig`, which contains a new key and its certificate, and returns its
    /// path.
    ///
    /// # Errors
    /// If `openssl` fails, or if a file cannot be read or written.
    pub(super) fn kubeconfig(&self, name: &str, subject: &str) -> Result<PathBuf> {
        self.certify(name, subject, None)?;
        let read = |path: &Path| -> Result<String> {
            let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
            Ok(STANDARD.encode(bytes))
        };
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "laboratory",
            "clusters": [{ "name": "laboratory", "cluster": {
                "server": self.server,
                "certificate-authority-data": read(&self.path("ca.crt"))?,
            }}],
            "users": [{ "name": name, "user": {
                "client-certificate-data": read(&self.path(&format!("{name}.crt")))?,
                "client-key-data": read(&self.path(&format!("{name}.key")))?,
            }}],
            "contexts": [{
                "name": "laboratory", "context": { "cluster": "laboratory", "user": name },
            }],
        });
        let path = self.path(&format!("{name}.kubeconfig"));
        fs::write(&path, config.to_string())?;
        Ok(path)
    }
}
