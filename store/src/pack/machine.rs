//! The packer's decisions, without I/O: it asks for one thing at a time and is told what came of it.
//!
//! The packer's steps of the collection protocol in `docs/FORMAT.md`. The simulator
//! drives this very code; `collect/model.rs` explores the same steps exhaustively.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::SnapshotId;
use crate::format::keys::PackId;

/// A packer that took longer gives up before it commits; part of the protocol.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// How long the outcome of a commit is asked for while it is unknown.
const DOUBT: Duration = Duration::from_secs(120);

/// What the packer wants done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Request {
    /// Write `lease/<txn>`, and keep it renewed. It must be durable before the answer.
    TakeLease,
    /// Read all condemned lists.
    Condemned,
    /// Read the commit records of the parents and look for their tombs, now.
    Parents,
    /// Write own packs and the manifest, which may refer to [`Packer::may_refer_to`] and own packs.
    Store,
    /// Create the commit record.
    Commit,
    /// Read the decision that is there.
    ReadDecision,
    /// Give the snapshot its name.
    Name,
    /// Stop renewing the lease and delete it.
    EndLease,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Done.
    Done,
    /// What some collector may be about to delete.
    Condemned(BTreeSet<PackId>),
    /// The packs of every parent that is committed and not removed.
    Parents(BTreeSet<PackId>),
    /// All packs that the manifest refers to, and how long the packer has been at work.
    Stored(BTreeSet<PackId>, Duration),
    /// The commit record is written.
    Created,
    /// A decision is there already.
    Exists,
    /// The store says that nothing was written.
    NotWritten,
    /// Whose decision is there, if any.
    Decision(Option<Verdict>),
    /// The store did not answer (in time); what was asked may happen yet. For so long now.
    Unknown(Duration),
}

/// Whose decision a transaction has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Our commit.
    Ours,
    /// Somebody else's commit.
    Anothers,
    /// A collector's abort.
    Aborted,
}

/// How a packing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    /// The snapshot exists.
    Committed,
    /// A collector ended it.
    Aborted,
    /// Somebody else's decision is there.
    Anothers,
    /// It took too long.
    TooLate,
    /// It may exist or not. Its lease stays: a collector decides.
    InDoubt,
    /// Something failed, and it does not exist.
    Failed,
}

/// One packing. Where carrying out a request fails, the driver says so with [`Packer::fail`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Packer {
    txn: SnapshotId,
    /// Nothing when it is over.
    next: Option<Request>,
    has_parents: bool,
    has_name: bool,
    condemned: BTreeSet<PackId>,
    allowed: BTreeSet<PackId>,
    /// A commit that was sent may still arrive.
    in_flight: bool,
    outcome: Option<Outcome>,
}

impl Packer {
    /// A packing that has asked for nothing yet. `has_parents`: it looks for pages of others;
    /// `has_name`: it gives the snapshot a name.
    pub(crate) fn new(txn: SnapshotId, has_parents: bool, has_name: bool) -> Self {
        Self {
            txn,
            next: Some(Request::TakeLease),
            has_parents,
            has_name,
            condemned: BTreeSet::new(),
            allowed: BTreeSet::new(),
            in_flight: false,
            outcome: None,
        }
    }

    /// What to do next; `None` when it is over.
    pub(crate) fn next(&self) -> Option<Request> {
        self.next
    }

    /// Whether the manifest may refer to a pack of somebody else: committed, not removed and not
    /// condemned when we looked, with our lease in the store.
    pub(crate) fn may_refer_to(&self, pack: &PackId) -> bool {
        self.allowed.contains(pack)
    }

    /// How it ended, once it is known.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.outcome
    }

    /// Takes the answer to [`Packer::next`]. An error is a bug of the driver, and nothing was committed.
    pub(crate) fn take(&mut self, answer: Answer) -> Result<(), String> {
        let Some(asked) = self.next else {
            return Err(format!("{answer:?} answers nothing: the packing is over"));
        };
        match (asked, answer) {
            (Request::TakeLease, Answer::Done) => {
                self.go_on(if self.has_parents { Request::Condemned } else { Request::Store });
            }
            (Request::Condemned, Answer::Condemned(packs)) => {
                self.condemned = packs;
                self.go_on(Request::Parents);
            }
            (Request::Parents, Answer::Parents(packs)) => {
                self.allowed = packs.difference(&self.condemned).copied().collect();
                self.go_on(Request::Store);
            }
            (Request::Store, Answer::Stored(packs, at_work)) => {
                let foreign = |pack: &&PackId| pack.txn != self.txn && !self.may_refer_to(pack);
                if let Some(pack) = packs.iter().find(foreign) {
                    return Err(format!("{} refers to {pack}, which it must not", self.txn));
                }
                match at_work > LONGEST {
                    true => self.end(Outcome::TooLate),
                    false => self.go_on(Request::Commit),
                }
            }
            (Request::Commit, Answer::Created) => self.commit(),
            (Request::Commit, Answer::Exists | Answer::NotWritten) => {
                self.go_on(Request::ReadDecision);
            }
            (Request::Commit | Request::ReadDecision, Answer::Unknown(since)) => {
                self.in_flight |= asked == Request::Commit;
                if since > DOUBT {
                    self.end(Outcome::InDoubt);
                }
            }
            (Request::ReadDecision, Answer::Decision(verdict)) => match verdict {
                Some(Verdict::Ours) => self.commit(),
                Some(Verdict::Anothers) => self.end(Outcome::Anothers),
                Some(Verdict::Aborted) => self.end(Outcome::Aborted),
                None if self.in_flight => self.go_on(Request::Commit),
                None => self.end(Outcome::Failed),
            },
            (Request::Name, Answer::Done) => self.go_on(Request::EndLease),
            (Request::EndLease, Answer::Done) => self.next = None,
            (asked, answer) => return Err(format!("{answer:?} does not answer {asked:?}")),
        }
        Ok(())
    }

    /// Carrying out the request failed for good.
    pub(crate) fn fail(&mut self) {
        match self.next {
            Some(Request::TakeLease | Request::Condemned | Request::Parents | Request::Store) => {
                self.end(Outcome::Failed)
            }
            Some(Request::Commit | Request::ReadDecision) => self.end(Outcome::InDoubt),
            // It is committed, and stays so.
            Some(Request::Name) => self.go_on(Request::EndLease),
            Some(Request::EndLease) | None => self.next = None,
        }
    }

    fn go_on(&mut self, next: Request) {
        self.next = Some(next);
    }

    fn commit(&mut self) {
        self.outcome = Some(Outcome::Committed);
        self.go_on(if self.has_name { Request::Name } else { Request::EndLease });
    }

    fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
        self.next = match outcome {
            // A commit on its way may refer to what a collector condemns next. With the lease there,
            // collectors settle the transaction first; without it nobody would know of it.
            Outcome::InDoubt => None,
            _ => Some(Request::EndLease),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_secs(1);

    fn txn(number: u8) -> SnapshotId {
        SnapshotId::from_bytes([number; 16])
    }

    fn pack(number: u8) -> PackId {
        PackId { txn: txn(number), number: 0 }
    }

    fn at_commit() -> Packer {
        let mut packer = Packer::new(txn(1), true, true);
        packer.take(Answer::Done).expect("a lease");
        packer.take(Answer::Condemned([pack(3)].into())).expect("lists");
        packer.take(Answer::Parents([pack(2), pack(3)].into())).expect("parents");
        packer
    }

    fn committing() -> Packer {
        let mut packer = at_commit();
        packer.take(Answer::Stored([pack(1), pack(2)].into(), SHORT)).expect("stored");
        packer
    }

    #[test]
    fn what_is_condemned_or_unknown_is_never_referred_to() {
        for foreign in [3, 4] {
            let stored = Answer::Stored([pack(1), pack(foreign)].into(), SHORT);
            assert!(at_commit().take(stored).is_err(), "pack of {foreign}");
        }
        assert_eq!(committing().next(), Some(Request::Commit));
    }

    #[test]
    fn a_packer_that_took_over_a_day_gives_up() {
        let mut packer = at_commit();
        let late = Duration::from_secs(24 * 3600 + 1);
        packer.take(Answer::Stored([pack(1)].into(), late)).expect("stored");
        assert_eq!(packer.outcome(), Some(Outcome::TooLate));
        assert_eq!(packer.next(), Some(Request::EndLease));
    }

    #[test]
    fn a_packer_in_doubt_asks_on_and_leaves_its_lease_in_the_end() {
        let mut packer = committing();
        packer.take(Answer::Unknown(SHORT)).expect("doubt");
        assert_eq!(packer.next(), Some(Request::Commit));
        packer.take(Answer::Unknown(DOUBT + SHORT)).expect("doubt");
        assert_eq!((packer.outcome(), packer.next()), (Some(Outcome::InDoubt), None));
        // Refused after a try that may arrive yet is doubt as well.
        let mut packer = committing();
        packer.take(Answer::Unknown(SHORT)).expect("doubt");
        packer.take(Answer::NotWritten).expect("refused");
        packer.take(Answer::Decision(None)).expect("nothing there");
        assert_eq!(packer.next(), Some(Request::Commit), "it may arrive yet");
        packer.fail();
        assert_eq!((packer.outcome(), packer.next()), (Some(Outcome::InDoubt), None));
    }

    #[test]
    fn only_our_own_decision_is_success() {
        for (verdict, outcome) in [
            (Some(Verdict::Ours), Outcome::Committed),
            (Some(Verdict::Anothers), Outcome::Anothers),
            (Some(Verdict::Aborted), Outcome::Aborted),
            (None, Outcome::Failed),
        ] {
            let mut packer = committing();
            packer.take(Answer::Exists).expect("there");
            packer.take(Answer::Decision(verdict)).expect("read");
            assert_eq!(packer.outcome(), Some(outcome));
            let next =
                if outcome == Outcome::Committed { Request::Name } else { Request::EndLease };
            assert_eq!(packer.next(), Some(next));
        }
    }

    #[test]
    fn a_name_that_cannot_be_given_leaves_a_committed_snapshot() {
        let mut packer = committing();
        packer.take(Answer::Created).expect("committed");
        packer.fail();
        assert_eq!(packer.outcome(), Some(Outcome::Committed));
        assert_eq!(packer.next(), Some(Request::EndLease));
    }
}
