//! Empty: cargo wants a target that is no test. The tests begin in `main.rs`.
