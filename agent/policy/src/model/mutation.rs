//! Deliberate faults of the compiler, with which a test proves that the property tests find faults.

/// A deliberate fault of the compiler. A test activates one fault at a time and expects
/// that the property tests find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// `NotIn` selects only objects that have the key.
    NotInNeedsKey,
    /// Exceptions of an `ipBlock` are ignored.
    IgnoreExcept,
    /// The exceptions of an `ipBlock` also apply to the other blocks of the rule.
    ShareExcept,
    /// A named port matches with any protocol.
    NamedPortOfAnyProtocol,
    /// `endPort` is exclusive.
    EndPortExclusive,
    /// A pod is isolated in both directions by a policy of either direction.
    IsolateBothDirections,
    /// A `Pass` skips the NetworkPolicy tier, too.
    PassSkipsNetworkPolicies,
    /// Policies of a tier are ordered by name only.
    IgnorePriority,
    /// An unknown peer of a `Deny` rule is left out.
    UnknownPeerIsIgnored,
    /// The Baseline tier applies to isolated pods, too.
    BaselineForIsolated,
    /// Rules without ports match TCP, UDP and SCTP only.
    NoPortsMeansTransport,
    /// A pod selector without a namespace selector selects pods of every namespace.
    ForgetOwnNamespace,
}

#[cfg(test)]
thread_local! {
    static ACTIVE: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}

/// Returns whether a test has activated this fault in this thread.
#[cfg(test)]
pub(crate) fn mutated(mutation: Mutation) -> bool {
    ACTIVE.get() == Some(mutation)
}

/// Returns `false`: only tests activate faults.
#[cfg(not(test))]
pub(crate) const fn mutated(_: Mutation) -> bool {
    false
}

/// Runs `f` with a fault.
#[cfg(test)]
pub(crate) fn with<T>(mutation: Option<Mutation>, f: impl FnOnce() -> T) -> T {
    let before = ACTIVE.replace(mutation);
    let result = f();
    ACTIVE.set(before);
    result
}
