"""Records llama.cpp's token ids of many strings for the default model: a second opinion on the converted tokenizer.

In an environment with `pip install llama-cpp-python`:

    python tests/references/record_llama_cpp_tokens.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

writes llama_cpp_tokens.json beside this file. Special tokens in a text count as such, and none are added around it.
"""

import hashlib
import itertools
import json
import pathlib
import sys

ORDINARY = """\
Hello, world!
hello
The quick brown fox jumps over the lazy dog.
It's John's; they're here, I've seen it, we'll go, I'd say don't, I'm sure.
IT'S JOHN'S; THEY'RE HERE, I'VE SEEN IT, WE'LL GO, I'D SAY DON'T, I'M SURE.
“Curly quotes” and ‘single ones’ — with an em dash… and an ellipsis
'Tis the season o' plenty, isn't it?
Dr. Smith (born in the U.S.A.) paid $12.50, i.e. 10% more than Mrs. Jones-Brown.
antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis
camelCaseWords PascalCaseWords snake_case_words kebab-case-words SCREAMING_SNAKE
e-mail: someone@example.com, web: https://www.example.com/a/b?c=d&e=f#frag
naïve café résumé façade über Ångström Čapek Łódź
What is the capital of France?
Once upon a time there was a little robot who
...
?!?!?!
a
A
Supercalifragilisticexpialidocious!!!
To be, or not to be: that is the question.
 leading space
  two leading spaces
a  b   c    d     e
ALL CAPS SENTENCE WITH NUMBERS 42 AND 7.
rock 'n' roll
the the the the the the
x'y'z 's 't 're 've 'm 'll 'd
‑non‑breaking‑hyphen and soft\u00adhyphen
""".split("\n")[:-1]

DIGITS = """\
0
7
10
123
1234567890
3.14159265358979
1,000,000.00
2024-11-24T10:09:58.123456Z
+1 (555) 010-9999
0x1F 0b1011 0o17 1e-05 6.022e23
v1.2.3-rc4
1st 2nd 3rd 4th
a1b2c3
99 bottles, 100%, $5, #1
1/2 + 3/4 = 5/4
12:30:45
192.168.0.1:8080
١٢٣٤٥
१२३
²³¹ ½ ¾ Ⅻ ⑨
１２３
3x3x3
000000000000
 5
  5
1 2 3  4   5
""".split("\n")[:-1]

CODE = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n\tprint(i)\n",
    "if (x == 1 && y != 2) { return x ? y : z; }",
    "#include <stdio.h>\nint main(void) {\n    printf(\"%d\\n\", 42);\n    return 0;\n}\n",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name ORDER BY 2 DESC;",
    "<div class=\"a b\" id='c'>text &amp; more</div><!-- comment -->",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"a\": \"b\"}}",
    "fn main() { let v: Vec<u32> = vec![1, 2, 3]; println!(\"{:?}\", v); }",
    "$ curl -s http://localhost:8000/v2/health/ready | jq '.'",
    "a->b::c.d[e](f){g};",
    "x += 1; y **= 2; z //= 3; w <<= 4; q ^= ~r",
    "lambda x: {**x, 'k': [*y]}",
    "```python\nprint('hi')\n```",
    "# Heading\n\n- item\n  - nested\n1. first\n2. second\n\n> quote\n\n**bold** _it_ `code`\n",
    "\\frac{a}{b} \\sum_{i=0}^{n} x_i^2 $$\\alpha$$",
    "C:\\Users\\name\\file.txt /usr/local/bin ~/x ./y ../z",
    "import numpy as np\n\n\nclass A:\n    \"\"\"Doc.\"\"\"\n\n    def f(self):\n        pass\n",
    "\t\tif err != nil {\n\t\t\treturn err\n\t\t}\n",
    "0123456789abcdef deadbeef CAFEBABE",
    "a=b;c==d;e===f;g!=h;i!==j;k=>l;m<=n",
    "((((((((((()))))))))))",
    "----------------------------------------",
    "================",
    "////// \\\\\\\\\\\\ ######",
    "@decorator\nasync def f(*, x: int | None = None) -> dict[str, int]: ...",
    "<?php echo $a['b']->c(); ?>",
    "^[a-z0-9]+(?:-[a-z0-9]+)*$",
    "key: value\nlist:\n  - a\n  - b: 1\n",
]

WHITE_SPACE = [
    " ", "  ", "   ", "    ", "     ", " " * 8, " " * 16, " " * 17, " " * 31, " " * 64, " " * 100, "\t", "\t\t", "\t\t\t\t",
    "\n", "\n\n", "\n\n\n", "\n\n\n\n\n", "\r", "\r\n", "\r\n\r\n", " \n", "\n ", " \n ", "\t\n\t", " \t ", "a\nb", "a\n\nb",
    "a\n\n\nb", "a \nb", "a\n b", "a \n b", "a  \n  b", "a\tb", "a\t\tb", "a \t b", "a\r\nb", "a\r\n\r\nb", "a\n  \n  b",
    "\n\n  a", "  \n\n a  ", "a   ", "   a", "a\n", "\na", "a\n\n", "a \n", "x\u00a0y", "x\u2003y", "x\u3000y", "x\u200by",
    "\u00a0", "\u00a0\u00a0", "x\u2028y\u2029z", "x\x0by\x0cz", "\x00", "a\x00b", "\x01\x02\x1f\x7f", "\ufeffbom", "x\x85y",
    "trailing space ", "trailing spaces   ", "5 ", "hello  world", "hello   world", "hello \t\n world", " hello", "  hello",
    "   hello", "1  2", "1   2", "!  !", "!   !", ".\n\n.",
]  # fmt: skip

SCRIPTS = """\
Привет, мир! Как дела?
Съешь же ещё этих мягких французских булок, да выпей чаю
Γειά σου Κόσμε, η γρήγορη αλεπού
Ελληνικά πολυτονικά: ἄνθρωπος
שלום עולם
שָׁלוֹם עִם נִקּוּד
مرحبا بالعالم، كيف حالك؟
السَّلَامُ عَلَيْكُمْ
سلام دنیا
ہیلو دنیا
नमस्ते दुनिया
हिन्दी में कुछ शब्द, क्षत्रिय
বাংলা ভাষা
ਪੰਜਾਬੀ
ગુજરાતી
தமிழ் மொழி
తెలుగు
ಕನ್ನಡ
മലയാളം
සිංහල
สวัสดีชาวโลก
ສະບາຍດີ
မင်္ဂလာပါ
ភាសាខ្មែរ
བོད་སྐད
გამარჯობა მსოფლიო
Բարեւ աշխարհ
አማርኛ
你好，世界！
今天天气怎么样？我们去公园吧。
繁體中文測試：龍龜鬱
こんにちは世界
カタカナとひらがなと漢字が混ざる文
ｶﾀｶﾅ ﾊﾝｶｸ
안녕하세요 세계
한글 조합형
Xin chào thế giới, tiếng Việt có dấu
Türkçe: İstanbul'da ışık, ğüşiöç
Polski: zażółć gęślą jaźń
Čeština: příliš žluťoučký kůň
Íslenska: þorn og eð
Magyar: árvíztűrő tükörfúrógép
Română: ștergeți țara
Esperanto: eĥoŝanĝo ĉiuĵaŭde
ᚠᚢᚦᚨᚱᚲ
𐍈𐌰𐌹𐌻𐌰
𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕥𝕖𝕩𝕥 𝓼𝓬𝓻𝓲𝓹𝓽
𠀀𠮷𡃁
ﬁ ﬂ ﷺ
Zalgo: Z̷̢a̵l̶g̸o̴
e\u0301 é n\u0303 ñ
mixed русский and 中文 and عربي 123
""".split("\n")[:-1]

EMOJI = """\
😀
😀😃😄
👍🏽
👨‍👩‍👧‍👦
🏳️‍🌈
🇫🇷🇩🇪
❤️ vs ❤
1️⃣2️⃣
☺☹♥♦♣♠
→←↑↓⇒⇔
✓✗✔✘
©®™
€£¥₹₿
∑∏∫√∞≈≠≤≥
┌─┐│└┘
█▓▒░
♪♫
hello 😀 world
a😀b
🤖: beep 🤖
🧑🏾‍💻 codes
° ± × ÷ µ
☕️
""".split("\n")[:-1]

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>b",
    "a <|im_end|> b", "<|im_end|><|im_end|>", "<|im_start |>", "<|im_start|", "|im_end|>", "<im_end>", "<|IM_END|>",
    "<repo_name>x<file_sep>y<filename>z", "<reponame>a/b<gh_stars>100-1000", "<issue_start>t<issue_comment>u<issue_closed>",
    "<jupyter_start><jupyter_text>m<jupyter_code>1+1<jupyter_output>2<jupyter_script>s<empty_output>", "<file_sep",
    "<|endoftext|> <|endoftext|>", "<|endoftext|>\n\n<|endoftext|>", "<s></s><unk><pad>", "[INST] x [/INST]",
    "<|endoftext|>1 2", "12<|im_end|>34", "  <|im_end|>  ", "\n<|im_end|>\n",
]  # fmt: skip

# Every digit count and letter case beside every common neighbour.
MIXED = ["".join(parts) for parts in itertools.product(["", " ", "\n"], ["a", "Z", "9", "é", "中", "'"], [" 12", "34x", "!?"])]


def texts() -> list[str]:
    return list(dict.fromkeys([*ORDINARY, *DIGITS, *CODE, *WHITE_SPACE, *SCRIPTS, *EMOJI, *SPECIAL, *MIXED]))


def record(source: pathlib.Path, target: pathlib.Path) -> None:
    import llama_cpp

    model = llama_cpp.Llama(str(source), vocab_only=True, verbose=False)
    rows = [{"text": text, "ids": model.tokenize(text.encode(), add_bos=False, special=True)} for text in texts()]
    with source.open("rb") as file:
        head = {
            "llama_cpp_python": llama_cpp.__version__,
            "source": source.name,
            "source_sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    target.write_text(f"{json.dumps(head)[:-1]}, \"rows\": [\n{lines}\n]}}\n", encoding="ascii")
    print(f"{len(rows)} strings, {sum(len(row['ids']) for row in rows)} tokens -> {target.name}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    record(pathlib.Path(sys.argv[1]), pathlib.Path(__file__).with_name("llama_cpp_tokens.json"))
