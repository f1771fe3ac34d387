//! Connections to the kernel: notifications, and requests outside of the runtime's threads.

use std::io;

use skein_netlink::nftables::{
    Change, Connection, Monitor, NFT_TIMEOUT, NftablesError, Subscription,
};

use super::encode::Step;
use super::error::EnforceError;

/// Maximum number of changes of elements of one transaction.
const MAX_CHANGES: usize = 1000;

/// Connections to nftables for one table.
#[derive(Debug)]
pub(super) struct Kernel {
    table: String,
    notifications: Subscription,
    /// Connection for requests; `None` while a thread uses it, and after a timeout.
    connection: Option<Connection>,
}

/// State of nftables before own transactions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Before {
    generation: u32,
    /// True if another program has changed the table since the last sequence, or notifications were
    /// lost.
    pub(super) foreign: bool,
}

impl Kernel {
    pub(super) fn open(table: &str, monitor: &Monitor) -> Result<Self, EnforceError> {
        let notifications = monitor.subscribe(table);
        Ok(Self { table: table.to_owned(), notifications, connection: Some(Connection::open()?) })
    }

    /// Name of the table.
    pub(super) fn table(&self) -> &str {
        &self.table
    }

    /// Waits for a transaction that touches the table, or for lost notifications.
    pub(super) async fn changed(&mut self) {
        self.notifications.changed().await;
    }

    /// Runs requests in a thread that may block: a transaction waits for the transactions of other
    /// programs.
    pub(super) async fn with<T: Send + 'static>(
        &mut self,
        requests: impl FnOnce(&mut Connection) -> Result<T, NftablesError> + Send + 'static,
    ) -> Result<T, EnforceError> {
        // After a timeout, the thread still owns the old connection.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => Connection::open()?,
        };
        let run = tokio::task::spawn_blocking(move || {
            let result = requests(&mut connection);
            (result, connection)
        });
        let finished =
            tokio::time::timeout(NFT_TIMEOUT, run).await.map_err(|_| EnforceError::Timeout)?;
        let (result, connection) = finished
            .map_err(|error| io::Error::other(error.to_string()))
            .map_err(NftablesError::Io)?;
        self.connection = Some(connection);
        Ok(result?)
    }

    /// Applies steps in their order, in transactions of about 1,000 changes. Returns the number of
    /// transactions.
    pub(super) async fn commit(&mut self, steps: Vec<Step>) -> Result<u32, EnforceError> {
        self.commit_all(transactions(steps)).await
    }

    /// Applies groups of changes in their order, in transactions of about 1,000 changes. Changes of
    /// a group belong to the same transaction. Returns the number of transactions.
    pub(super) async fn commit_groups(
        &mut self,
        groups: Vec<Vec<Change>>,
    ) -> Result<u32, EnforceError> {
        let mut transactions: Vec<Vec<Change>> = Vec::new();
        for group in groups {
            match transactions.last_mut() {
                Some(last) if last.len() + group.len() <= MAX_CHANGES => last.extend(group),
                _ => transactions.push(group),
            }
        }
        self.commit_all(transactions).await
    }

    async fn commit_all(&mut self, transactions: Vec<Vec<Change>>) -> Result<u32, EnforceError> {
        let count = u32::try_from(transactions.len()).unwrap_or(u32::MAX);
        let table = self.table.clone();
        if count > 0 {
            self.with(move |connection| {
                transactions.iter().try_for_each(|changes| connection.commit(&table, changes))
            })
            .await?;
        }
        Ok(count)
    }

    /// Starts a sequence of own transactions.
    pub(super) async fn begin(&mut self) -> Result<Before, EnforceError> {
        let received = self.notifications.drain().await;
        let generation = self.generation()?;
        Ok(Before { generation, foreign: received.lost || received.transactions > 0 })
    }

    /// Ends a sequence of own transactions. Returns whether no other program has changed the table
    /// since the start of the sequence.
    pub(super) async fn end(&mut self, before: Before, own: u32) -> Result<bool, EnforceError> {
        let generation = self.generation()?;
        let received = self.notifications.drain().await;
        // The generation counts the transactions about other tables, too. Notifications can be
        // lost. Either proves that no other transaction has touched the table.
        Ok(generation.wrapping_sub(before.generation) == own
            || (!received.lost && received.transactions <= own as usize))
    }

    fn generation(&self) -> Result<u32, EnforceError> {
        self.notifications.monitor().generation().map_err(EnforceError::Monitor)
    }
}

/// Distributes steps to transactions. In each transaction, removals from a set come before
/// additions to it, and the order of sets is the order of the steps.
fn transactions(steps: Vec<Step>) -> Vec<Vec<Change>> {
    let mut transactions: Vec<Vec<Change>> = Vec::new();
    let (mut pending, mut size) = (Vec::new(), 0);
    for step in steps {
        if size + step.len() > MAX_CHANGES && !pending.is_empty() {
            transactions.push(flatten(std::mem::take(&mut pending)));
            size = 0;
        }
        size += step.len();
        pending.push(step);
    }
    if !pending.is_empty() {
        transactions.push(flatten(pending));
    }
    transactions
}

fn flatten(steps: Vec<Step>) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut steps = steps.into_iter().peekable();
    while let Some(first) = steps.next() {
        let set = first.set.clone();
        let mut of_set: Vec<Change> = first.changes().collect();
        while let Some(step) = steps.next_if(|step| step.set == set) {
            of_set.extend(step.changes());
        }
        of_set.sort_by_key(|change| change.added);
        changes.extend(of_set);
    }
    changes
}
