//! A seccomp profile as a program for the kernel (seccomp(2), Documentation/networking/filter in the kernel's source).
//!
//! Why not leave it to the runtime: libseccomp takes 20 ms and more to translate a profile of this size, more than
//! all else of a machine's start (MEASURED with crun 1.8), and the list of comparisons it makes costs every system call;
//! this is a search tree.

/// One instruction: `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    k: u32,
}

const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_GREATER: u16 = 0x25;
const IF_AT_LEAST: u16 = 0x35;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`; of the arguments the lower half, on little-endian machines.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;

/// A comparison of an argument's lower 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Test {
    Equal(u32),
    Less(u32),
    Greater(u32),
    /// None of these bits is set.
    NoneOf(u32),
}

/// What becomes of a system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Allow,
    Errno(u32),
    /// Allowed when the argument of that index passes one of the tests; else the errno.
    AllowIf(u32, Vec<Test>, u32),
}

/// Ways to enter the kernel: an AUDIT_ARCH value, and the verdict for each number that has one.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) arch: u32,
    pub(super) verdicts: std::collections::BTreeMap<u32, Verdict>,
}

fn op(code: u16, k: u32) -> Instruction {
    Instruction { code, if_true: 0, if_false: 0, k }
}

fn branch(code: u16, k: u32, if_true: u8, if_false: u8) -> Instruction {
    Instruction { code, if_true, if_false, k }
}

/// The program, as the runtime wants it: the instructions' bytes.
pub(super) fn program(tables: &[Table], otherwise: u32) -> Vec<u8> {
    let mut code = vec![op(LOAD, ARCHITECTURE)];
    for table in tables {
        let body = search(&ranges(table, otherwise), otherwise);
        // The architecture is still loaded when the next table is reached.
        code.push(branch(IF_EQUAL, table.arch, 1, 0));
        code.push(op(JUMP, body.len() as u32 + 1));
        code.push(op(LOAD, NUMBER));
        code.extend(body);
    }
    code.push(op(RETURN, ERRNO | otherwise));
    let bytes = |i: &Instruction| {
        let [a, b] = i.code.to_ne_bytes();
        let [c, d, e, f] = i.k.to_ne_bytes();
        [a, b, i.if_true, i.if_false, c, d, e, f]
    };
    code.iter().flat_map(bytes).collect()
}

/// Where each run of numbers with one verdict begins.
fn ranges(table: &Table, otherwise: u32) -> Vec<(u32, Verdict)> {
    let mut all: Vec<(u32, Verdict)> = vec![(0, Verdict::Errno(otherwise))];
    let mut push = |at: u32, verdict: Verdict| {
        match all.last_mut() {
            Some((start, last)) if *start == at => *last = verdict,
            Some((_, last)) if *last == verdict => return,
            _ => all.push((at, verdict)),
        }
        // What replaced a verdict may be the one before it.
        if let [.., (_, before), (_, last)] = all.as_slice()
            && before == last
        {
            all.pop();
        }
    };
    for (number, verdict) in &table.verdicts {
        push(*number, verdict.clone());
        push(number + 1, Verdict::Errno(otherwise));
    }
    all
}

fn search(ranges: &[(u32, Verdict)], otherwise: u32) -> Vec<Instruction> {
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let Some((middle, verdict)) = right.first() else { return vec![op(RETURN, ERRNO | otherwise)] };
    if left.is_empty() {
        return leaf(verdict);
    }
    let (left, right) = (search(left, otherwise), search(right, otherwise));
    let mut code = match u8::try_from(left.len()) {
        Ok(skip) => vec![branch(IF_AT_LEAST, *middle, skip, 0)],
        Err(_) => vec![branch(IF_AT_LEAST, *middle, 0, 1), op(JUMP, left.len() as u32)],
    };
    code.extend(left);
    code.extend(right);
    code
}

fn leaf(verdict: &Verdict) -> Vec<Instruction> {
    match verdict {
        Verdict::Allow => vec![op(RETURN, ALLOW)],
        Verdict::Errno(errno) => vec![op(RETURN, ERRNO | errno)],
        Verdict::AllowIf(argument, tests, errno) => {
            let mut code = vec![op(LOAD, ARGUMENTS + 8 * argument)];
            for test in tests {
                // Each test is followed by the return that it leads to or passes over.
                code.push(match *test {
                    Test::Equal(value) => branch(IF_EQUAL, value, 0, 1),
                    Test::Less(value) => branch(IF_AT_LEAST, value, 1, 0),
                    Test::Greater(value) => branch(IF_GREATER, value, 0, 1),
                    Test::NoneOf(bits) => branch(IF_ANY_BIT, bits, 1, 0),
                });
                code.push(op(RETURN, ALLOW));
            }
            code.push(op(RETURN, ERRNO | errno));
            code
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Runs a program as the kernel would.
    fn run(bytes: &[u8], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let code: Vec<Instruction> = bytes
            .chunks(8)
            .map(|b| Instruction {
                code: u16::from_ne_bytes([b[0], b[1]]),
                if_true: b[2],
                if_false: b[3],
                k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            })
            .collect();
        let (mut at, mut a) = (0, 0);
        loop {
            let i = code[at];
            at += 1;
            let taken = match i.code {
                LOAD if i.k == NUMBER => {
                    a = number;
                    continue;
                }
                LOAD if i.k == ARCHITECTURE => {
                    a = arch;
                    continue;
                }
                LOAD => {
                    a = args[((i.k - ARGUMENTS) / 8) as usize] as u32;
                    continue;
                }
                JUMP => {
                    at += i.k as usize;
                    continue;
                }
                RETURN => return i.k,
                IF_EQUAL => a == i.k,
                IF_GREATER => a > i.k,
                IF_AT_LEAST => a >= i.k,
                IF_ANY_BIT => a & i.k != 0,
                other => panic!("instruction {other:#x}"),
            };
            at += usize::from(if taken { i.if_true } else { i.if_false });
        }
    }

    #[test]
    fn every_number_gets_its_verdict() {
        // Sparse enough that the tree has jumps longer than a byte can say.
        let mut first = BTreeMap::new();
        for number in 0..1500_u32 {
            match number % 7 {
                0 | 1 => first.insert(number, Verdict::Allow),
                2 => first.insert(number, Verdict::Errno(1)),
                3 => first.insert(number, Verdict::AllowIf(0, vec![Test::Less(38), Test::Greater(40)], 38)),
                4 => first.insert(number, Verdict::AllowIf(1, vec![Test::NoneOf(0b110), Test::Equal(7)], 38)),
                _ => None,
            };
        }
        let second = BTreeMap::from([(3, Verdict::Allow)]);
        let tables = [Table { arch: 11, verdicts: first }, Table { arch: 22, verdicts: second }];
        let code = program(&tables, 38);
        let deny = ERRNO | 38;
        for number in 0..1600 {
            let want = match number % 7 {
                _ if number >= 1500 => deny,
                0 | 1 | 3 | 4 => ALLOW,
                2 => ERRNO | 1,
                _ => deny,
            };
            assert_eq!(run(&code, 11, number, [37, 1, 0, 0, 0, 0]), want, "{number}");
        }
        for (arg, want) in [(0, ALLOW), (37, ALLOW), (38, deny), (40, deny), (41, ALLOW)] {
            assert_eq!(run(&code, 11, 3, [arg, 0, 0, 0, 0, 0]), want);
        }
        for (arg, want) in [(1, ALLOW), (2, deny), (6, deny), (7, ALLOW)] {
            assert_eq!(run(&code, 11, 4, [0, arg, 0, 0, 0, 0]), want);
        }
        assert_eq!(
            (run(&code, 22, 3, [0; 6]), run(&code, 22, 4, [0; 6]), run(&code, 33, 3, [0; 6])),
            (ALLOW, deny, deny)
        );
    }
}
