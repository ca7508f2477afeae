"""`python -m minipeft …`"""

from minipeft.lab.cli import main

if __name__ == "__main__":
    main()
