//! Data plane of a keeper: its lock, the descriptor store and the listening socket.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use anyhow::Context;
use skein_ipc::Response;
use skein_sys::descriptors;
use skein_sys::lock::FileLock;

use super::client::{HANDOVER_TIMEOUT, shut_down_unlocked};
use crate::channel::{answer_listener, answer_queues};
use crate::fd_store::{FdStore, StoredFds};
use crate::handover::{Answer, ToKeeper, receive, send};
use crate::options::Options;
use crate::server;

/// Data plane that belongs to this keeper.
pub(super) struct Plane {
    /// Lock of the data plane. The data process holds a copy, so the lock is free only after both
    /// processes have exited.
    pub(super) lock: FileLock,
    pub(super) store: FdStore,
    pub(super) listener: UnixListener,
    /// Path of the listening socket.
    socket: PathBuf,
    pub(super) stored: Option<StoredFds>,
}

impl Plane {
    /// Opens the data plane: with the descriptors in the store, or with a new socket if the store
    /// is empty.
    ///
    /// # Errors
    /// An error if the store cannot be created or the socket cannot be bound.
    pub(super) fn open(
        lock: FileLock,
        store: Option<FdStore>,
        options: &Options,
    ) -> anyhow::Result<Self> {
        let mut store = match store {
            Some(store) => store,
            None => FdStore::create().context("cannot create the descriptor store")?,
        };
        let (listener, stored) = match store.take() {
            Some((listener, stored)) => (listener, Some(stored)),
            None => {
                if options.takes_over() {
                    shut_down_unlocked(&options.socket)?;
                }
                (server::bind(&options.socket)?, None)
            }
        };
        let socket = options.socket.clone();
        let mut plane = Self { lock, store, listener, socket, stored };
        plane.save();
        Ok(plane)
    }

    /// Copies the descriptors of the data process to the store; logs an error.
    pub(super) fn save(&mut self) {
        let Some(stored) = &self.stored else { return self.store.clear() };
        if let Err(error) = self.store.put(&self.listener, stored) {
            tracing::error!(%error, "cannot store descriptors: a take-over would lose the sessions");
        }
    }

    /// Handles a message of the data process. Returns the connection to hand over to, if the
    /// message requests a hand-over.
    ///
    /// # Errors
    /// The error of the channel; `UnexpectedEof` if the data process has closed it.
    pub(super) fn on_message(&mut self, channel: &UnixStream) -> io::Result<Option<UnixStream>> {
        let message = receive(channel)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        match message {
            ToKeeper::Store { state } => {
                let descriptors = descriptors::receive(channel, state.descriptor_count())?;
                self.stored = Some(StoredFds { state, descriptors });
            }
            ToKeeper::Snapshot => {
                let later = descriptors::receive(channel, 1)?.pop();
                if let (Some(stored), Some(later)) = (&mut self.stored, later) {
                    stored.descriptors[0] = later;
                }
            }
            ToKeeper::Forget => self.stored = None,
            ToKeeper::OpenQueues { name, queues, allowed } => {
                answer_queues(channel, &name, queues, allowed)?;
                return Ok(None);
            }
            ToKeeper::Listen => {
                let created = server::bind(&self.socket).map(|new| {
                    self.listener = new;
                    &self.listener
                });
                answer_listener(channel, created)?;
            }
            ToKeeper::DeleteSocket => {
                // The next start removes a stale file.
                let _ = std::fs::remove_file(&self.socket);
                send(channel, &Answer::Done, &[])?;
                return Ok(None);
            }
            ToKeeper::HandOver => {
                return Ok(descriptors::receive(channel, 1)?.pop().map(UnixStream::from));
            }
        }
        self.save();
        Ok(None)
    }

    /// Sends the lock and the store to the keeper at the other end. Returns whether that keeper has
    /// confirmed their receipt.
    pub(super) fn hand_over(&self, connection: &UnixStream) -> bool {
        let hand_over = || -> io::Result<()> {
            connection.set_read_timeout(Some(HANDOVER_TIMEOUT))?;
            connection.set_write_timeout(Some(HANDOVER_TIMEOUT))?;
            let all: Vec<_> =
                [self.lock.as_fd()].into_iter().chain(self.store.descriptors()).collect();
            send(connection, &Response::HandOver, &all)?;
            (&*connection).read_exact(&mut [0])
        };
        let result = hand_over();
        if let Err(error) = &result {
            tracing::error!(%error, "hand-over to the new keeper failed");
        }
        result.is_ok()
    }
}
