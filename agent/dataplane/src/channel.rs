//! Data process's end of the channel to its keeper: messages, and requests for operations that a
//! confined process cannot perform.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Mutex, PoisonError};

use skein_sys::descriptors;
use skein_sys::fallback::{Fallback, Feature};
use skein_sys::tun::{self, OpenQueues, TunOffload};

use super::error::SetupError;
use super::handover::{Answer, ToKeeper, receive, send};

/// Channel to the keeper. A mutex gives the channel to one thread at a time, so that each answer
/// belongs to the last request. A keeper that exits ends its data process, so a request needs no
/// timeout.
#[derive(Debug)]
pub(super) struct KeeperChannel(Mutex<UnixStream>);

impl KeeperChannel {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(Mutex::new(stream))
    }

    /// Sends a message that has no answer, with its descriptors.
    ///
    /// # Errors
    /// The error of the socket.
    pub(super) fn notify(
        &self,
        message: &ToKeeper,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        send(&stream, message, descriptors)
    }

    /// Sends a request and returns the answer with its descriptors.
    ///
    /// # Errors
    /// The error of the socket; `UnexpectedEof` if the keeper has closed it.
    fn request(&self, message: &ToKeeper) -> io::Result<(Answer, Vec<OwnedFd>)> {
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        send(&stream, message, &[])?;
        let answer: Answer = receive(&stream)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let descriptors = descriptors::receive(&stream, answer.descriptor_count())?;
        Ok((answer, descriptors))
    }

    /// Requests `queues` queues of the TUN device `name` ([`tun::open_queues`]).
    ///
    /// # Errors
    /// [`SetupError::Refused`] with the keeper's error, [`SetupError::Io`] if the channel fails.
    pub(super) fn open_queues(
        &self,
        name: &str,
        queues: u8,
        allowed: TunOffload,
    ) -> Result<OpenQueues, SetupError> {
        let request = ToKeeper::OpenQueues { name: name.to_owned(), queues, allowed };
        match self.request(&request)? {
            (Answer::Queues { offload, notes, .. }, descriptors) => {
                let inherit = |fd| tun::inherit_queue(fd, name);
                let queues = descriptors.into_iter().map(inherit).collect::<Result<_, _>>()?;
                let fallbacks = notes.into_iter().filter_map(|(label, reason)| {
                    let feature = Feature::TUN.into_iter().find(|known| known.label() == label)?;
                    Some(Fallback { feature, reason })
                });
                Ok(OpenQueues { queues, offload, fallbacks: fallbacks.collect() })
            }
            (Answer::Refused { kind, message }, _) => Err(SetupError::Refused { kind, message }),
            _ => Err(unrelated_answer().into()),
        }
    }

    /// Requests a new listening socket, after another program has deleted or replaced the file of
    /// the previous one.
    ///
    /// # Errors
    /// The keeper's error, or the error of the channel.
    pub(super) fn listen(&self) -> io::Result<UnixListener> {
        let (answer, mut descriptors) = self.request(&ToKeeper::Listen)?;
        match (answer, descriptors.pop()) {
            (Answer::Listener, Some(listener)) => Ok(listener.into()),
            (Answer::Refused { message, .. }, _) => Err(io::Error::other(message)),
            _ => Err(unrelated_answer()),
        }
    }

    /// Requests the deletion of the listening socket's file. A failed deletion is not reported.
    ///
    /// # Errors
    /// The error of the channel.
    pub(super) fn delete_socket(&self) -> io::Result<()> {
        self.request(&ToKeeper::DeleteSocket).map(drop)
    }
}

fn unrelated_answer() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the keeper's answer belongs to another request")
}

/// Opens queues of the TUN device and sends them, or the error, as the keeper's answer.
///
/// # Errors
/// The error of the channel.
pub(super) fn answer_queues(
    channel: &UnixStream,
    name: &str,
    queues: u8,
    allowed: TunOffload,
) -> io::Result<()> {
    match tun::open_queues(name, queues.into(), allowed) {
        Ok(OpenQueues { queues: open, offload, fallbacks }) => {
            let note = |fallback: Fallback| (fallback.feature.label().to_owned(), fallback.reason);
            let notes = fallbacks.into_iter().map(note).collect();
            let all: Vec<_> = open.iter().map(AsFd::as_fd).collect();
            send(channel, &Answer::Queues { queues, offload, notes }, &all)
        }
        Err(error) => refuse(channel, &SetupError::from(error)),
    }
}

/// Sends a new listening socket, or the error of its creation, as the keeper's answer.
///
/// # Errors
/// The error of the channel.
pub(super) fn answer_listener(
    channel: &UnixStream,
    listener: anyhow::Result<&UnixListener>,
) -> io::Result<()> {
    match listener {
        Ok(listener) => send(channel, &Answer::Listener, &[listener.as_fd()]),
        Err(error) => refuse(channel, &SetupError::Invalid(format!("{error:#}"))),
    }
}

fn refuse(channel: &UnixStream, error: &SetupError) -> io::Result<()> {
    let answer = Answer::Refused { kind: error.kind(), message: error.to_string() };
    send(channel, &answer, &[])
}
