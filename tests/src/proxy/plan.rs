//! What a proxy does to which request. Pure: no I/O, no clock; a seed decides what chance would.

use std::ops::Range;
use std::time::Duration;

use serde::Serialize;

/// What a request asks for, in S3's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// An object or a part of one.
    Get,
    /// Whether an object is there, and its length.
    Head,
    /// An object is written.
    Put,
    /// One object goes, or several in one request.
    Delete,
    /// Keys below a prefix.
    List,
    /// Anything else.
    Other,
}

/// A request as rules see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// What for.
    pub operation: Operation,
    /// The key, bucket first; of a listing, bucket and prefix; of a DELETE of several, all of them.
    pub key: String,
}

/// How long the first byte of an answer takes, from the last byte of the request on; longer only if the server does.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Delay {
    /// As long as the server takes.
    #[default]
    None,
    /// This.
    Fixed(Duration),
    /// A draw from the log-normal distribution with these two percentiles.
    Spread {
        /// Half of the requests take no longer.
        p50: Duration,
        /// 99 % of the requests take no longer.
        p99: Duration,
    },
}

/// What a connection is like.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shape {
    /// Before the first byte of an answer.
    pub first_byte: Delay,
    /// Bytes a second of each connection, each way; unlimited if not given.
    pub bytes_per_second: Option<u64>,
}

/// What goes wrong with one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Before effect: it is answered with this status and goes no further.
    Refuse(u16),
    /// Before effect: the connection is reset.
    Reset,
    /// Before effect: nothing is answered for so long, then the connection ends.
    Hang(Duration),
    /// After effect: the server's answer is dropped and the connection ends.
    LoseAnswer,
    /// After effect: the server's answer is replaced by this status.
    FailAnswer(u16),
    /// After effect: nothing is answered for so long, then the connection ends.
    HangAnswer(Duration),
    /// The body of a GET of an object ends early.
    Truncate,
    /// One bit of the body of a GET of an object is another.
    Flip,
    /// A PUT or DELETE is sent once more, so long after it was answered.
    Duplicate(Duration),
}

impl Fault {
    /// One word, as in logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Refuse(_) => "refused",
            Self::Reset => "reset",
            Self::Hang(_) => "hung",
            Self::LoseAnswer => "answer-lost",
            Self::FailAnswer(_) => "answer-failed",
            Self::HangAnswer(_) => "answer-hung",
            Self::Truncate => "truncated",
            Self::Flip => "flipped",
            Self::Duplicate(_) => "duplicated",
        }
    }

    /// Whether there is such a fault of this operation. A listing is not damaged: below TLS it has no
    /// checksum, and no reader could know.
    fn concerns(&self, operation: Operation) -> bool {
        match self {
            Self::Truncate | Self::Flip => operation == Operation::Get,
            Self::Duplicate(_) => matches!(operation, Operation::Put | Operation::Delete),
            _ => true,
        }
    }
}

/// How likely what is, for each request; from 0 to 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Rates {
    /// 503, 500 or a reset, in equal parts.
    pub before_effect: f64,
    /// The answer lost or replaced by 500, in equal parts.
    pub after_effect: f64,
    /// A hang before effect or after it, in equal parts.
    pub hang: f64,
    /// How long a hang lasts.
    pub hang_for: Range<Duration>,
    /// A GET's body that ends early.
    pub truncated: f64,
    /// A GET's body with a wrong bit.
    pub wrong: f64,
    /// A late duplicate of a PUT or DELETE.
    pub duplicate: f64,
    /// How late.
    pub duplicate_after: Range<Duration>,
}

impl Default for Rates {
    fn default() -> Self {
        let [short, long] = [1, 4].map(Duration::from_secs);
        Self {
            before_effect: 0.0,
            after_effect: 0.0,
            hang: 0.0,
            hang_for: short..long,
            truncated: 0.0,
            wrong: 0.0,
            duplicate: 0.0,
            duplicate_after: short..long,
        }
    }
}

impl Rates {
    /// What a draw from 0 to 1 comes to.
    fn fault(&self, draws: &mut Draws) -> Option<Fault> {
        let mut left = draws.unit();
        let mut falls_in = |rate: f64| {
            let inside = left < rate;
            left -= rate;
            inside
        };
        if falls_in(self.before_effect) {
            return Some(match draws.below(3) {
                0 => Fault::Refuse(503),
                1 => Fault::Refuse(500),
                _ => Fault::Reset,
            });
        }
        if falls_in(self.after_effect) {
            return Some([Fault::LoseAnswer, Fault::FailAnswer(500)][draws.below(2)]);
        }
        if falls_in(self.hang) {
            let long = draws.between(&self.hang_for);
            return Some([Fault::Hang(long), Fault::HangAnswer(long)][draws.below(2)]);
        }
        if falls_in(self.truncated) {
            return Some(Fault::Truncate);
        }
        if falls_in(self.wrong) {
            return Some(Fault::Flip);
        }
        falls_in(self.duplicate).then(|| Fault::Duplicate(draws.between(&self.duplicate_after)))
    }
}

/// A fault for certain requests. Rules go before rates, the first that fits decides.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Only these; any if not given.
    pub operation: Option<Operation>,
    /// Only where the key contains this.
    pub key_contains: String,
    /// So many requests that fit are let pass first.
    pub skip: u32,
    /// Then so many get the fault, and no more after them.
    pub times: u32,
    /// What they get.
    pub fault: Fault,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// What connections are like.
    pub shape: Shape,
    /// What goes wrong by chance.
    pub rates: Rates,
    /// What goes wrong by design.
    pub rules: Vec<Rule>,
    /// Decides what chance would.
    pub seed: u64,
}

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Fate {
    pub(super) delay: Duration,
    pub(super) fault: Option<Fault>,
    /// Where in a body, from 0 to 1.
    pub(super) place: f64,
}

impl Plan {
    /// The fate of request number `number`. Rules remember what they have met.
    pub(super) fn decide(&mut self, asked: &Asked, number: u64) -> Fate {
        let mut draws = Draws::new(self.seed, number);
        let delay = match self.shape.first_byte {
            Delay::None => Duration::ZERO,
            Delay::Fixed(delay) => delay,
            Delay::Spread { p50, p99 } => draws.spread(p50, p99),
        };
        let place = draws.unit();
        let ruled = self.rules.iter_mut().find_map(|rule| rule.meet(asked));
        let fault = ruled.or_else(|| self.rates.fault(&mut draws));
        Fate { delay, fault: fault.filter(|fault| fault.concerns(asked.operation)), place }
    }
}

impl Rule {
    fn meet(&mut self, asked: &Asked) -> Option<Fault> {
        let fits = self.operation.is_none_or(|operation| operation == asked.operation)
            && asked.key.contains(&self.key_contains)
            && self.fault.concerns(asked.operation);
        if !fits || self.times == 0 {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.times -= 1;
        Some(self.fault)
    }
}

/// Numbers that look random (SplitMix64) and follow from a seed.
pub struct Draws(u64);

impl Draws {
    /// The `stream`th sequence of a seed.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut draws = Self(seed ^ stream.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        draws.bits();
        draws
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    /// A time in the range.
    pub fn between(&mut self, range: &Range<Duration>) -> Duration {
        range.start + range.end.saturating_sub(range.start).mul_f64(self.unit())
    }

    /// From the log-normal distribution with these percentiles.
    fn spread(&mut self, p50: Duration, p99: Duration) -> Duration {
        // Box and Muller; 2.326 deviations are 99 %.
        let (radius, angle) = ((-2.0 * (1.0 - self.unit()).ln()).sqrt(), self.unit());
        let normal = radius * (std::f64::consts::TAU * angle).cos();
        let deviation = (p99.as_secs_f64() / p50.as_secs_f64().max(1e-9)).max(1.0).ln() / 2.326;
        p50.mul_f64((normal * deviation).exp().min(1000.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(operation: Operation, key: &str) -> Asked {
        Asked { operation, key: key.into() }
    }

    #[test]
    fn rates_come_true_and_only_where_they_can() {
        let rates = Rates {
            before_effect: 0.05,
            after_effect: 0.02,
            hang: 0.01,
            truncated: 0.01,
            wrong: 0.01,
            duplicate: 0.03,
            ..Rates::default()
        };
        let mut plan = Plan { rates, seed: 7, ..Plan::default() };
        let mut count = |operation| {
            let mut counts = std::collections::BTreeMap::<&str, u32>::new();
            for number in 0..100_000 {
                let fault = plan.decide(&asked(operation, "a"), number).fault;
                *counts.entry(fault.map_or("none", |fault| fault.name())).or_default() += 1;
            }
            counts
        };
        let gets = count(Operation::Get);
        for (name, wanted) in
            [("refused", 3333), ("reset", 1667), ("answer-lost", 1000), ("flipped", 1000)]
        {
            assert!(gets[name].abs_diff(wanted) < wanted / 5, "{name}: {gets:?}");
        }
        assert!(!gets.contains_key("duplicated"));
        let puts = count(Operation::Put);
        assert!(puts["duplicated"].abs_diff(3000) < 300 && !puts.contains_key("flipped"));
    }

    #[test]
    fn a_rule_skips_hits_and_is_spent() {
        let rule = Rule {
            operation: Some(Operation::Put),
            key_contains: "/snap/".into(),
            skip: 1,
            times: 2,
            fault: Fault::LoseAnswer,
        };
        let mut plan = Plan { rules: vec![rule], ..Plan::default() };
        let mut faults = |operation, key: &str| {
            (0..4).map(|at| plan.decide(&asked(operation, key), at).fault.is_some()).collect()
        };
        let none: Vec<bool> = faults(Operation::Get, "b/snap/1");
        assert_eq!(none, [false; 4]);
        assert_eq!(faults(Operation::Put, "b/pack/1"), [false; 4]);
        assert_eq!(faults(Operation::Put, "b/snap/1"), [false, true, true, false]);
    }

    #[test]
    fn a_spread_delay_has_its_percentiles() {
        let [p50, p99] = [30, 90].map(Duration::from_millis);
        let mut draws = Draws::new(1, 1);
        let mut delays: Vec<_> = (0..20_000).map(|_| draws.spread(p50, p99)).collect();
        delays.sort();
        for (at, wanted) in [(10_000, p50), (19_800, p99)] {
            let ratio = delays[at].as_secs_f64() / wanted.as_secs_f64();
            assert!((0.9..1.1).contains(&ratio), "{:?} is not {wanted:?}", delays[at]);
        }
    }
}
