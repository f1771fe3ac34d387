//! Node records of agents.

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use toml::Table;

/// Node record of an agent.
#[derive(Debug, Clone)]
pub struct Record {
    /// Name of the node.
    pub name: String,
    /// Public key, base64.
    pub public_key: String,
    /// Second public key, base64, during a key rotation.
    pub second_public_key: Option<String>,
    /// Endpoints, each as `address:port`.
    pub endpoints: Vec<String>,
    /// Prefixes of the node's pods.
    pub pod_cidrs: Vec<String>,
}

impl Record {
    /// Creates the record of a node that does not exist, with a random public key. Numbers below
    /// 65536 have different endpoints, numbers below 16384 different IPv4 prefixes.
    ///
    /// # Errors
    /// If the kernel has no random bytes.
    pub fn synthetic(number: u32) -> Result<Self> {
        let mut key = [0; 32];
        rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())?;
        let [_, _, high, low] = number.to_be_bytes();
        Ok(Self {
            name: format!("fleet-{number}"),
            public_key: BASE64.encode(key),
            second_public_key: None,
            endpoints: vec![format!("198.18.{high}.{low}:51900")],
            pod_cidrs: vec![
                format!("100.{}.{low}.0/24", 64 + u32::from(high) % 64),
                format!("fd00:99:{number:x}::/64"),
            ],
        })
    }

    /// Returns the content of the record's TOML file.
    pub fn to_toml(&self) -> String {
        self.to_table().to_string()
    }

    /// Returns the content of one TOML file with several records.
    pub fn all_to_toml(records: &[Self]) -> String {
        let tables: Vec<Table> = records.iter().map(Self::to_table).collect();
        Table::from_iter([("node".to_owned(), tables.into())]).to_string()
    }

    fn to_table(&self) -> Table {
        let mut table = Table::new();
        table.insert("name".into(), self.name.clone().into());
        table.insert("public_key".into(), self.public_key.clone().into());
        if let Some(second) = &self.second_public_key {
            table.insert("second_public_key".into(), second.clone().into());
        }
        table.insert("endpoints".into(), self.endpoints.clone().into());
        table.insert("pod_cidrs".into(), self.pod_cidrs.clone().into());
        table
    }
}
