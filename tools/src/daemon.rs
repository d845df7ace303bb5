//! `reapd`: serves snapshots on a worker node.
