//! Results of handshakes and their counters.

macro_rules! handshake_results {
    ($($(#[$doc:meta])* $variant:ident => $label:literal;)*) => {
        /// The result of a handshake or of one of its messages. [`HandshakeResult::label`] is a
        /// metric label and never changes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum HandshakeResult { $($(#[$doc])* $variant,)* }

        impl HandshakeResult {
            /// All results in the order of their discriminants.
            pub const ALL: &'static [HandshakeResult] = &[$(HandshakeResult::$variant,)*];

            /// Returns the value of the metric label `result`.
            pub const fn label(self) -> &'static str {
                match self { $(HandshakeResult::$variant => $label,)* }
            }
        }
    };
}

handshake_results! {
    /// Initiation sent by this node; retries count.
    Initiated => "initiated";
    /// A handshake that this node initiated completed.
    CompletedInitiator => "completed_initiator";
    /// A handshake that the peer initiated completed: an authentic datagram arrived in its session.
    CompletedResponder => "completed_responder";
    /// An initiation got no response in time.
    Timeout => "timeout";
    /// A message was malformed, had a wrong mac1, or did not decrypt.
    Invalid => "invalid";
    /// No node record has the public key of an initiation.
    UnknownPeer => "unknown_peer";
    /// An initiation was not newer than the last accepted one.
    Replayed => "replayed";
    /// An initiation or response was refused because its source or peer exceeded a rate limit.
    RateLimited => "rate_limited";
    /// Cookie reply sent by this node under load, instead of a response.
    CookieSent => "cookie_sent";
    /// A peer under load sent a cookie reply.
    CookieReceived => "cookie_received";
    /// The two nodes have no cipher in common.
    NoCommonCipher => "no_common_cipher";
}

/// Number of handshakes by result since the engine was created.
#[derive(Debug, Clone)]
pub(crate) struct HandshakeCounts([u64; HandshakeResult::ALL.len()]);

impl Default for HandshakeCounts {
    fn default() -> Self {
        Self([0; HandshakeResult::ALL.len()])
    }
}

impl HandshakeCounts {
    pub(crate) fn get(&self, result: HandshakeResult) -> u64 {
        self.0[result as usize]
    }

    pub(crate) fn add(&mut self, result: HandshakeResult) {
        self.0[result as usize] += 1;
    }
}
