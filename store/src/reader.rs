//! A reader's decisions about one snapshot, without I/O: the reader's steps of the collection protocol
//! in `docs/FORMAT.md`. The simulator drives this very code; `collect/model.rs` explores the same
//! steps exhaustively.

/// What the reader wants done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Write the pin. It must be durable before the answer.
    Pin,
    /// Is there a tomb?
    LookForTomb,
    /// Delete the pin.
    Unpin,
}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Done.
    Done,
    /// Whether there is a tomb.
    Tomb(bool),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum At {
    #[default]
    Pin,
    LookForTomb,
    Serving,
    Unpin,
    End,
}

/// One opening of a snapshot on a node, until it is let go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Reader {
    at: At,
    removed: bool,
}

impl Reader {
    /// What to do next; `None` while it serves and when it is over.
    pub(crate) fn next(&self) -> Option<Request> {
        match self.at {
            At::Pin => Some(Request::Pin),
            At::LookForTomb => Some(Request::LookForTomb),
            At::Unpin => Some(Request::Unpin),
            At::Serving | At::End => None,
        }
    }

    /// Takes the answer to [`Reader::next`].
    pub(crate) fn take(&mut self, answer: Answer) {
        self.at = match (self.at, answer) {
            (At::Pin, Answer::Done) => At::LookForTomb,
            // Only now: a collector that saw no pin has seen the tomb, and so do we.
            (At::LookForTomb, Answer::Tomb(false)) => At::Serving,
            (At::LookForTomb, Answer::Tomb(true)) => {
                self.removed = true;
                At::Unpin
            }
            (At::Unpin, Answer::Done) => At::End,
            (at, answer) => unreachable!("{answer:?} answers nothing at {at:?}; this is a bug"),
        };
    }

    /// Opening failed: a pin may be there all the same.
    pub(crate) fn fail(&mut self) {
        self.at = At::Unpin;
    }

    /// Nobody reads any more.
    pub(crate) fn let_go(&mut self) {
        if self.at == At::Serving {
            self.at = At::Unpin;
        }
    }

    /// Whether the snapshot may be read.
    pub(crate) fn is_serving(&self) -> bool {
        self.at == At::Serving
    }

    /// Whether the snapshot was removed before it was opened.
    pub(crate) fn was_removed(&self) -> bool {
        self.removed
    }
}
