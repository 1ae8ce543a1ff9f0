//! Ages as people write them: `45m`, `12h`, `30d`, `4w`.

use std::time::Duration;

const UNITS: [(char, u64); 5] = [
    ('w', 7 * 86_400),
    ('d', 86_400),
    ('h', 3600),
    ('m', 60),
    ('s', 1),
];
/// A hundred years: what is more can only be a slip.
const MOST: u64 = 36_500 * 86_400;

/// Nothing if it is none.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let (_, seconds) = UNITS.iter().find(|(letter, _)| *letter == unit)?;
    let digits = &text[..text.len() - 1];
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let seconds = digits.parse::<u64>().ok()?.checked_mul(*seconds)?;
    (1..=MOST)
        .contains(&seconds)
        .then(|| Duration::from_secs(seconds))
}

/// In the largest unit that fits.
pub(crate) fn show(age: Duration) -> String {
    let seconds = age.as_secs();
    let fits = |(_, unit): &&(char, u64)| seconds.is_multiple_of(*unit);
    match UNITS.iter().find(fits) {
        Some((letter, unit)) => format!("{}{letter}", seconds / unit),
        None => format!("{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_good_and_bad() {
        for (text, seconds) in [
            ("45m", Some(2700)),
            ("12h", Some(43_200)),
            ("30d", Some(2_592_000)),
            ("4w", Some(2_419_200)),
            ("1s", Some(1)),
            ("36500d", Some(MOST)),
            ("36501d", None),
            ("0d", None),
            ("", None),
            ("d", None),
            ("30", None),
            ("-1d", None),
            ("+1d", None),
            ("1.5d", None),
            ("1 d", None),
            ("30D", None),
            ("1é", None),
            ("99999999999999999999d", None),
            ("99999999999999999w", None),
        ] {
            assert_eq!(parse(text), seconds.map(Duration::from_secs), "{text}");
        }
        for text in ["30d", "45m", "90m", "1h", "36h", "61s"] {
            assert_eq!(parse(&show(parse(text).unwrap())), parse(text), "{text}");
        }
        assert_eq!(show(Duration::from_secs(86_400 * 14)), "2w");
        assert_eq!(show(Duration::from_secs(86_400 * 30)), "30d");
    }
}
